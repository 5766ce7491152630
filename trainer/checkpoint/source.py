"""Find what a training starts from: its own newest checkpoint, one given by --init-from, or initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin.parallel.config import ModelConfig
from griffin.trainer.checkpoint.manifest import CheckpointError, check
from griffin.trainer.checkpoint.steps import newest_complete, resolve
from griffin.trainer.run.folder import RunFolder, model_differences

OWN, INIT_FROM, FRESH = "own", "init-from", "fresh"  # rules, in this order of precedence


@dataclass(frozen=True, kw_only=True)
class InitFrom:
    """The checkpoint to start from that --init-from and --init-what give."""

    path: Path  # of a step, a checkpoints folder or a run folder
    everything: bool  # with optimizer state, step and position in the data; otherwise weights only


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is loaded."""

    rule: str  # OWN, INIT_FROM or FRESH
    path: Path | None  # the step's folder; None for FRESH
    everything: bool  # with optimizer state, step and position in the data; otherwise weights only
    step: int  # optimizer steps done at the start
    config: Mapping[str, Any] | None  # of the checkpoint's manifest
    skipped: tuple[str, ...]  # a message for each newer checkpoint of the run, which is damaged
    text: str  # what is loaded, in one line


def find_source(run_dir: Path, init_from: InitFrom | None) -> Source:
    """Find what the run of `run_dir` starts from: a checkpoint that passes `manifest.check`, or initial weights.

    In order of precedence: the newest complete checkpoint of the run itself, `init_from`, initial weights.

    Raises:
        CheckpointError: `init_from`, or every checkpoint that the run has, is incomplete or damaged; the message names
            the file.
        ValueError: the checkpoint holds weights only, but everything is to be loaded.
    """
    root = RunFolder(run_dir).checkpoints
    own, damaged = newest_complete(root)
    skipped = tuple(map(str, damaged))
    if own is not None:
        unused = f"; --init-from {init_from.path} is for its first start only" if init_from else ""
        return _source(OWN, own, True, f"{run_dir} (the run's own folder{unused})", skipped)
    if skipped:
        raise CheckpointError(
            f"{root}: no checkpoint of this run is complete; move the folder away to start without it\n"
            + "\n".join(skipped)
        )
    if init_from is not None:
        path = resolve(init_from.path)
        what = "optimizer state, step and place in the data as well" if init_from.everything else "weights only"
        return _source(INIT_FROM, path, init_from.everything, f"{path.absolute().parent} (--init-from; {what})", ())
    text = "Weights: drawn from train.seed (no checkpoint)"
    return Source(rule=FRESH, path=None, everything=False, step=0, config=None, skipped=(), text=text)


def refuse_other_model(model: ModelConfig, there: Mapping[str, Any], where: Path | str = "the checkpoint") -> None:
    """Raise ValueError naming the settings in which `model` differs from `there`, the `config["model"]` of a manifest.

    `init` may differ: it only concerns initial weights.
    """
    differing = model_differences(model, {**there, "init": model.init})
    if differing:
        raise ValueError(f"{where}: holds another model ({', '.join(differing)})")


def _source(rule: str, path: Path, everything: bool, origin: str, skipped: tuple[str, ...]) -> Source:
    manifest = check(path)
    if everything and manifest.optimizer is None:
        how = "use --init-what weights" if rule == INIT_FROM else "start another run with --init-from"
        raise ValueError(f"{path}: holds weights only, from which a training cannot be continued; {how}")
    return Source(
        rule=rule,
        path=path,
        everything=everything,
        step=manifest.step if everything else 0,
        config=manifest.config,
        skipped=skipped,
        text=f"Weights: step {manifest.step} of {origin}",
    )

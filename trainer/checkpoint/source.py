"""What a training starts from: its own newest checkpoint, another one that it is told of, or nothing."""

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
    """A checkpoint to start from, as --init-from and --init-what give it."""

    path: Path  # of a step, a checkpoints folder or a run folder
    everything: bool  # optimizer state, step and position in the data as well; otherwise weights only


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is loaded. `text` says so in one line."""

    rule: str  # OWN, INIT_FROM or FRESH
    path: Path | None  # the step's folder; None for FRESH
    everything: bool  # optimizer state, step and position in the data as well as weights
    step: int  # optimizer steps that are done at the start
    config: Mapping[str, Any] | None  # that the checkpoint was saved with, as its manifest holds it
    skipped: tuple[str, ...]  # newer checkpoints of the run that are damaged: which file, and what is wrong with it
    text: str


def find_source(run_dir: Path, init_from: InitFrom | None) -> Source:
    """What the run of `run_dir` starts from, found complete by its manifest and the sizes of all files.

    The newest complete checkpoint of the run itself comes first, then `init_from`, then weights that are drawn.

    Raises:
        CheckpointError: something of `init_from`, or of every checkpoint that the run has, is missing or damaged; the
            message names the file.
        ValueError: the checkpoint holds weights only where more is asked for.
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
    """ValueError with the settings in which `model` differs from a manifest's `config["model"]`, that of `where`.

    `init` may differ: it is about drawing weights.
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

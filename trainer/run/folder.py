"""The folder that a run leaves behind: what it was made from, and everything it reported."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin.parallel.config import ModelConfig
from griffin.parallel.world.ranks import Ranks
from griffin.trainer.run.lock import NAME as LOCK
from griffin.trainer.run.lock import refuse_if_held
from griffin.trainer.settings.load import read_settings, to_toml
from griffin.trainer.settings.sections import Config

PACKAGES = ("torch", "megatron-core", "numpy", "triton", "apex", "transformer-engine")
LAUNCH = "launch"  # folder of the jobs that start the run
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"  # of "started" in environment.json
SOURCE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder, which one process, rank 0, writes.

    Each start of the run is an attempt, counted from 1, with files of its own for what it was made from.
    """

    path: Path
    attempt: int = 1

    @property
    def config(self) -> Path:
        return self.path / f"config{self._suffix}.toml"

    @property
    def environment(self) -> Path:
        return self.path / f"environment{self._suffix}.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        return self.path / LOCK

    @property
    def launch(self) -> Path:
        return self.path / LAUNCH

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def events(self) -> Path:
        """TensorBoard's events: in a folder of the run's name, which is shown. Of a run `begun_flat`, tensorboard/."""
        return self.tensorboard if self.begun_flat else self.tensorboard / (self.path.resolve().name or "run")

    @property
    def begun_flat(self) -> bool:
        """Whether an older version began the run, whose curves then go on as they were: no folder, no groups."""
        return any(self.tensorboard.glob("events.out.tfevents.*"))

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def console(self) -> Path:
        return self.path / "console.log"

    @property
    def hangs(self) -> Path:
        return self.path / "hangs"

    @property
    def stragglers(self) -> Path:
        return self.path / "stragglers.json"

    @classmethod
    def check(cls, path: Path, config: Config) -> None:
        """Refuse a `path` where this run cannot be started or continued: ValueError, and nothing is written.

        That is where something else than a run stands, a run of another model, or one that another process of this
        machine writes now; `RunLock.acquire` finds those of other machines.
        """
        refuse_if_held(path)
        cls._check(path, config)

    @classmethod
    def _check(cls, path: Path, config: Config) -> None:
        folder = cls(path)
        if folder.config.exists():
            there = dataclasses.asdict(read_settings(folder.config).model)
            differing = model_differences(config.model, there)
            if differing:
                raise ValueError(
                    f"--run-dir {path}: holds a run of another model ({', '.join(differing)}); choose another --run-dir"
                )
        elif path.exists() and not (path.is_dir() and all(_comes_first(file.name) for file in path.iterdir())):
            raise ValueError(f"--run-dir {path}: exists and is not an empty folder; choose another --run-dir")
        above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ValueError(f"--run-dir {path}: must be in a folder that can be written; {above} is not one")

    @classmethod
    def create(cls, path: Path, config: Config, environment: Mapping[str, Any]) -> RunFolder:
        """The folder of a new attempt, with its resolved config and its environment in it. For the lock's owner.

        Refuses what `check` refuses, but for the lock.
        """
        cls._check(path, config)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, 1 + _attempts(path))
        with folder.config.open("x", encoding="utf-8") as file:
            file.write(to_toml(config))
        with folder.environment.open("x", encoding="utf-8") as file:
            file.write(json.dumps(environment, indent=2) + "\n")
        return folder

    @property
    def _suffix(self) -> str:
        return "" if self.attempt == 1 else f".attempt-{self.attempt}"


def default_run_folder(config_path: Path, config: Config) -> Path:
    """`log.run_root`/NAME-TIME, after the config file's name and the local time."""
    return Path(config.log.run_root) / f"{Path(config_path).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def describe_environment(
    config: Config, ranks: Ranks, device: str, implementations: Mapping[str, str]
) -> dict[str, Any]:
    """What environment.json holds: versions, code, command, machine, layout, and the `implementations` in use.

    `implementations` says what computes the optimizer, attention and the rest, for instance {"attention": "flex"}.
    """
    parallel = config.parallel
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "command": shlex.join(sys.argv),  # of the parent, in a rank that run_local started
        "hostname": socket.gethostname(),
        "started": time.strftime(TIME_FORMAT),
        "world_size": ranks.world_size,
        "launched_by": ranks.source,
        "layout": {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "sequence_parallel": parallel.sequence_parallel,
            "data": ranks.world_size // parallel.model_ranks,
        },
        "device": device,
        "implementations": dict(implementations),
    }


def changed_settings(config: Config, earlier: Mapping[str, Any]) -> list[str]:
    """ "section.key OLD -> NEW" for each setting in which `config` differs from an earlier one.

    `earlier` is `dataclasses.asdict` of a Config as JSON may have kept it, with lists for tuples. A setting that it
    does not have, of a version that did not know it, stood at today's default.
    """
    return [
        f"{section.name}.{key} {json.dumps(old)} -> {json.dumps(new)}"
        for section in dataclasses.fields(config)
        for key, old, new in _differences(getattr(config, section.name), earlier.get(section.name, {}))
    ]


def model_differences(model: ModelConfig, there: Mapping[str, Any]) -> list[str]:
    """ "model.KEY is OLD there, NEW here" for each setting in which `model` differs from `there`, an asdict of one."""
    return [f"model.{key} is {old!r} there, {new!r} here" for key, old, new in _differences(model, there)]


def _differences(section: Any, there: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of each field that differs; the values as JSON has them."""
    for field in dataclasses.fields(section):
        default = None if field.default is dataclasses.MISSING else field.default
        old, new = there.get(field.name, default), getattr(section, field.name)
        old, new = map(_as_json, (old, new))
        if old != new:
            yield field.name, old, new


def _as_json(value: Any) -> Any:
    """With lists for tuples."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _attempts(path: Path) -> int:
    """How often the run in folder `path` was started; 0 if never."""
    names = [file.name for file in path.iterdir()]
    later = [int(match[1]) for name in names if (match := re.fullmatch(r"config\.attempt-(\d+)\.toml", name))]
    return max([int("config.toml" in names), *later])


def _comes_first(name: str) -> bool:
    """What a folder may hold before its run: the job that starts it, the lock, a newcomer's claim on that."""
    return name == LAUNCH or name.partition(".")[0] == LOCK


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the code that runs and whether files differ from it; None outside of a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(SOURCE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != SOURCE:  # installed inside of somebody else's checkout
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None

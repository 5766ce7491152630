"""The run folder: its files, its creation, and the description of the environment."""

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

PACKAGES = ("torch", "megatron-core", "numpy", "triton", "apex", "flash-attn-3", "transformer-engine")
LAUNCH = "launch"  # folder of job scripts
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"  # of "started" in environment.json
SOURCE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder, which rank 0 writes.

    Each start of the run is an attempt, counted from 1, with its own config and environment files.
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
        """Folder of TensorBoard's event files, named after the run; tensorboard/ itself if the run is `begun_flat`."""
        return self.tensorboard if self.begun_flat else self.tensorboard / (self.path.resolve().name or "run")

    @property
    def begun_flat(self) -> bool:
        """Whether an older version began the run; its curves continue as they were, with no subfolder and no groups."""
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
        """Raise ValueError if this run cannot be started or resumed in `path`. Nothing is written.

        It cannot if `path` holds anything but a run, a run of another model, or a run that another process of this
        machine is writing; `RunLock.acquire` detects processes of other machines.
        """
        refuse_if_held(path)
        cls._check(path, config)

    @classmethod
    def _check(cls, path: Path, config: Config) -> None:
        folder = cls(path)
        if folder.config.exists():
            previous = dataclasses.asdict(read_settings(folder.config).model)
            differing = model_differences(config.model, previous)
            if differing:
                raise ValueError(
                    f"--run-dir {path}: holds a run of another model ({', '.join(differing)}); choose another --run-dir"
                )
        elif path.exists() and not (path.is_dir() and all(_may_precede_run(file.name) for file in path.iterdir())):
            raise ValueError(f"--run-dir {path}: exists and is not an empty folder; choose another --run-dir")
        above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ValueError(f"--run-dir {path}: must be in a writable folder; {above} is not one")

    @classmethod
    def create(cls, path: Path, config: Config, environment: Mapping[str, Any]) -> RunFolder:
        """Create the folder of a new attempt, with its resolved config and its environment. Call it with the lock held.

        Refuses what `check` refuses, except for a lock.
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
    """`log.run_root`/NAME-TIME, with the name of the config file and the local time."""
    return Path(config.log.run_root) / f"{Path(config_path).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def describe_environment(
    config: Config, ranks: Ranks, device: str, implementations: Mapping[str, str]
) -> dict[str, Any]:
    """The content of environment.json: versions, code, command, machine, layout, and the `implementations` in use.

    `implementations` names what computes the optimizer, attention and the rest, such as {"attention": "flex"}.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "command": shlex.join(sys.argv),  # that of the parent in ranks that `griffin train` started
        "hostname": socket.gethostname(),
        "started": time.strftime(TIME_FORMAT),
        "world_size": ranks.world_size,
        "launched_by": ranks.source,
        "layout": config.parallel.record(ranks.world_size),
        "device": device,
        "implementations": dict(implementations),
    }


def changed_settings(config: Config, previous: Mapping[str, Any]) -> list[str]:
    """ "section.key OLD -> NEW" for each setting in which `config` differs from `previous`.

    `previous` is `dataclasses.asdict` of a Config, perhaps from JSON, with lists for tuples. A setting that it lacks,
    because an older version did not have it, counts as today's default.
    """
    return [
        f"{section.name}.{key} {json.dumps(old)} -> {json.dumps(new)}"
        for section in dataclasses.fields(config)
        for key, old, new in _differences(getattr(config, section.name), previous.get(section.name, {}))
    ]


def model_differences(model: ModelConfig, previous: Mapping[str, Any]) -> list[str]:
    """ "model.KEY is OLD there, NEW here" for each setting in which `model` differs from `previous`, an asdict."""
    return [f"model.{key} is {old!r} there, {new!r} here" for key, old, new in _differences(model, previous)]


def _differences(section: Any, previous: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, previous value, current value) of each field that differs, with values as in JSON."""
    for field in dataclasses.fields(section):
        default = None if field.default is dataclasses.MISSING else field.default
        old, new = previous.get(field.name, default), getattr(section, field.name)
        old, new = map(_as_json, (old, new))
        if old != new:
            yield field.name, old, new


def _as_json(value: Any) -> Any:
    """The value as in JSON, with lists for tuples."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _attempts(path: Path) -> int:
    """How many times the run in folder `path` was started."""
    names = [file.name for file in path.iterdir()]
    later = [int(match[1]) for name in names if (match := re.fullmatch(r"config\.attempt-(\d+)\.toml", name))]
    return max([int("config.toml" in names), *later])


def _may_precede_run(name: str) -> bool:
    """Whether a folder may hold this file before its run: job scripts, the lock, or a claim on the lock."""
    return name == LAUNCH or name.partition(".")[0] == LOCK


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the running code, and whether files differ from it; None outside of a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(SOURCE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != SOURCE:  # installed inside another project's checkout
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None

"""The folder that a run leaves behind: what it was made from, and everything it reported."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin.parallel.ranks import Ranks
from griffin.trainer.config import Config, load_config, to_toml

PACKAGES = ("torch", "megatron-core", "numpy", "triton", "apex", "transformer-engine")
SOURCE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder, which one process, rank 0, writes."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def console(self) -> Path:
        return self.path / "console.log"

    @classmethod
    def check(cls, path: Path, config: Config) -> None:
        """Refuse a `path` at which something stands already: ValueError, and nothing is written."""
        folder = cls(path)
        if folder.config.exists():
            differing = _differing(config.model, load_config(folder.config).model)
            if differing:
                raise ValueError(
                    f"--run-dir {path}: holds a run of another model ({', '.join(differing)}); choose another --run-dir"
                )
            raise ValueError(
                f"--run-dir {path}: exists and cannot be continued yet: checkpoints are not available; "
                "choose another --run-dir"
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"--run-dir {path}: exists and is not an empty folder; choose another --run-dir")
        above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ValueError(f"--run-dir {path}: must be in a folder that can be written; {above} is not one")

    @classmethod
    def create(cls, path: Path, config: Config, environment: Mapping[str, Any]) -> RunFolder:
        """Make the folder with the resolved config and the environment in it. Refuses what `check` refuses."""
        cls.check(path, config)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        with folder.config.open("x", encoding="utf-8") as file:  # "x": of two runs at once, one fails
            file.write(to_toml(config))
        folder.environment.write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
        return folder


def default_run_folder(config_path: Path, config: Config) -> Path:
    """`log.run_root`/NAME-TIME, after the config file's name and the local time."""
    return Path(config.log.run_root) / f"{Path(config_path).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def describe_environment(
    config: Config, ranks: Ranks, device: str, implementations: Mapping[str, str]
) -> dict[str, Any]:
    """What environment.json holds: versions, code, command, machine, layout, and the `implementations` in use.

    `implementations` says what computes the optimizer, norm, attention and scan, for instance {"norm": "apex"}.
    """
    parallel = config.parallel
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "command": shlex.join(sys.argv),  # of the parent, in a rank that run_local started
        "hostname": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
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


def _differing(new: Any, old: Any) -> list[str]:
    """ "model.KEY is OLD there, NEW here" for each field in which two model configs differ."""
    names = [field.name for field in dataclasses.fields(new)]
    return [
        f"model.{name} is {getattr(old, name)!r} there, {getattr(new, name)!r} here"
        for name in names
        if getattr(old, name) != getattr(new, name)
    ]


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

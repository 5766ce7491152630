from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import griffin.trainer.run.folder as run_folder
from griffin.parallel.config import ModelConfig, ParallelConfig
from griffin.parallel.world.ranks import Ranks
from griffin.trainer.reporting.console import Console
from griffin.trainer.run.folder import RunFolder, changed_settings, default_run_folder, describe_environment
from griffin.trainer.run.lock import RunLock
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import CheckpointConfig, Config, LogConfig, TrainConfig

MODEL = ModelConfig(
    pattern=("recurrent", "attention"), width=32, recurrent_width=64, heads=2, head_dim=16, vocabulary=257
)
RANKS = Ranks(rank=0, world_size=8, local_rank=0, address="a", port=1, source="slurm", store_served=False)
CONFIG = Config(model=MODEL, parallel=ParallelConfig(tensor=2), log=LogConfig(run_root="elsewhere"))


def snapshot(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_create(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a" / "run", CONFIG, {"python": "3"})
    assert load_config(folder.config) == CONFIG
    assert json.loads(folder.environment.read_text()) == {"python": "3"}
    assert sorted(file.name for file in folder.path.iterdir()) == ["config.toml", "environment.json"]


def test_empty_folder_is_used(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG, {})
    assert (tmp_path / "config.toml").exists()


def test_folder_that_is_only_locked_is_used(tmp_path: Path) -> None:
    for name in ("lock", "lock.after-0123"):
        (tmp_path / name).touch()
    assert RunFolder.create(tmp_path, CONFIG, {}).attempt == 1


def test_attempts_of_the_same_model(tmp_path: Path) -> None:
    """A run resumes in its folder; the config and environment of earlier attempts stay as they were."""
    configs = [dataclasses.replace(CONFIG, train=TrainConfig(steps=steps)) for steps in range(1, 13)]
    written: dict[Path, bytes] = {}
    for attempt, config in enumerate(configs, start=1):
        RunFolder.check(tmp_path, config)
        assert snapshot(tmp_path) == written
        folder = RunFolder.create(tmp_path, config, {"attempt": attempt})
        assert folder.attempt == attempt
        assert load_config(folder.config) == config
        assert json.loads(folder.environment.read_text()) == {"attempt": attempt}
        assert written.items() <= snapshot(tmp_path).items()
        written = snapshot(tmp_path)
    assert len(written) == 24
    assert {"config.toml", "environment.json", "config.attempt-2.toml", "environment.attempt-12.json"} <= {
        path.name for path in written
    }


def test_attempts_of_another_model_are_refused_whichever_came_before(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG, {})
    RunFolder.create(tmp_path, CONFIG, {})
    before = snapshot(tmp_path)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, pattern=("recurrent",)))
    for attempt in (RunFolder.check, lambda path, config: RunFolder.create(path, config, {})):
        with pytest.raises(
            ValueError, match=r"model\.pattern is \['recurrent', 'attention'\] there, \['recurrent'\] h"
        ):
            attempt(tmp_path, other)
    assert snapshot(tmp_path) == before


def test_folder_that_a_living_run_writes_is_refused_by_the_check(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG, {})
    with RunLock.acquire(tmp_path) as lock:
        with pytest.raises(ValueError, match=rf"another run writes this folder: .*\(process {os.getpid()}"):
            RunFolder.check(tmp_path, CONFIG)
        assert RunFolder(tmp_path).lock == lock.path
        assert RunFolder.create(tmp_path, CONFIG, {}).attempt == 2  # by the owner itself
    RunFolder.check(tmp_path, CONFIG)


def test_changed_settings() -> None:
    earlier = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert changed_settings(CONFIG, earlier) == []
    now = dataclasses.replace(
        CONFIG,
        parallel=ParallelConfig(tensor=1, stages=(1, 1)),
        train=TrainConfig(dtype="float32"),
        checkpoint=CheckpointConfig(keep_last=3),
    )
    changes = [
        "parallel.tensor 2 -> 1",
        "parallel.stages [] -> [1, 1]",
        'train.dtype "bfloat16" -> "float32"',
        "checkpoint.keep_last 0 -> 3",
    ]
    assert changed_settings(now, earlier) == changes
    del earlier["checkpoint"]["interval"]  # a version that did not know these
    assert changed_settings(now, earlier) == changes
    del earlier["checkpoint"]
    assert changed_settings(now, earlier) == changes
    earlier["train"]["forgotten"] = 1  # and one that knew more
    assert changed_settings(now, earlier) == changes


def test_folder_of_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG, {})
    before = snapshot(tmp_path)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, width=48, window=64))
    with pytest.raises(
        ValueError,
        match=r"holds a run of another model \(model\.width is 32 there, 48 here, model\.window is 1024 there, 64 her",
    ):
        RunFolder.create(tmp_path, other, {})
    assert snapshot(tmp_path) == before


def test_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("my thesis")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match=f"--run-dir {path}: exists and is not an empty folder"):
            RunFolder.create(path, CONFIG, {})
    assert snapshot(tmp_path) == {tmp_path / "thesis.txt": b"my thesis"}


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    path = default_run_folder(Path("configs/small.toml"), CONFIG)
    assert path.parent == Path("elsewhere")
    assert path.match("small-[0-9]*-[0-9]*")
    assert len(path.name) == len("small-YYYYmmdd-HHMMSS")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["griffin", "train", "my config.toml"])
    environment = describe_environment(CONFIG, RANKS, "cpu", {"norm": "torch"})
    assert json.loads(json.dumps(environment)) == environment
    assert environment["world_size"] == 8
    assert environment["launched_by"] == "slurm"
    assert environment["layout"]["data"] == 4
    assert environment["implementations"] == {"norm": "torch"}
    assert environment["packages"]["megatron-core"] == "0.16.1"
    assert environment["packages"]["numpy"]
    assert environment["command"] == "griffin train 'my config.toml'"


def test_git_state_is_that_of_the_codes_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def state() -> object:
        return describe_environment(CONFIG, RANKS, "cpu", {})["git"]

    monkeypatch.setattr(run_folder, "SOURCE", tmp_path.resolve())
    assert state() is None
    git("init")
    (tmp_path / "code.py").write_text("")
    git("add", ".")
    git("commit", "-m", "code")
    assert state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "code.py").write_text("changed")
    assert state() == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    (tmp_path / "installed").mkdir()
    monkeypatch.setattr(run_folder, "SOURCE", tmp_path.resolve() / "installed")
    assert state() is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


VALUES = {"loss": 5.25, "grad_norm": 1.5, "learning_rate": 3e-4, "tokens_per_second": 12_345.6, "tokens": 4096}


def test_console_prints_plain_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(RunFolder(tmp_path), steps=100, stream=stream) as console:
        console.print("training")
        console.step(1, VALUES)
        console.step(2)
        console.step(3, VALUES)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training"
    assert lines[1] == "step   1/100  loss 5.2500  grad_norm 1.500  learning_rate 3.00e-04  12,346 tokens/s"
    assert lines[2].startswith("step   3/100  loss 5.2500")
    assert lines[2].endswith(" 00:00 left")
    assert len(lines) == 3
    assert (tmp_path / "console.log").read_text() == stream.getvalue()


def test_console_estimates_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 60.0, 62.0, 64.0])  # the first step compiles for a minute
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Console(RunFolder(tmp_path), steps=103, stream=stream) as console:
        assert next(clock) == 0.0
        console.step(1)
        console.step(2)
        console.step(3, VALUES)
    assert stream.getvalue().endswith("  03:20 left\n")  # 100 steps of 2 s


def test_console_shows_a_bar_in_a_terminal(tmp_path: Path) -> None:
    stream = Terminal()
    with Console(RunFolder(tmp_path), steps=2, stream=stream) as console:
        console.print("training")
        console.step(1, VALUES)
        console.step(2, VALUES)
    shown = stream.getvalue()
    assert "training\n" in shown
    assert "2/2" in shown
    assert "loss 5.2500, 12,346 tokens/s" in shown
    assert "grad_norm" not in shown
    assert len((tmp_path / "console.log").read_text().splitlines()) == 3


def test_console_log_keeps_the_error_that_ended_the_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Console(RunFolder(tmp_path), steps=2, stream=stream):
        raise RuntimeError("the oven is cold")
    assert stream.getvalue() == ""
    assert (tmp_path / "console.log").read_text().endswith("RuntimeError: the oven is cold\n")

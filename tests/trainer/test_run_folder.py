from __future__ import annotations

import dataclasses
import io
import json
import subprocess
from pathlib import Path

import pytest

import griffin.trainer.run_folder as run_folder
from griffin.parallel.config import ModelConfig, ParallelConfig
from griffin.parallel.ranks import Ranks
from griffin.trainer.config import Config, LogConfig, TrainConfig, load_config
from griffin.trainer.console import Console
from griffin.trainer.run_folder import RunFolder, default_run_folder, describe_environment

MODEL = ModelConfig(
    pattern=("recurrent", "attention"), width=32, recurrent_width=64, heads=2, head_dim=16, vocabulary=257
)
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


def test_folder_of_a_run_of_the_same_model_is_refused(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG, {})
    before = snapshot(tmp_path)
    longer = dataclasses.replace(CONFIG, train=TrainConfig(steps=20_000))
    for attempt in (RunFolder.check, lambda path, config: RunFolder.create(path, config, {})):
        with pytest.raises(ValueError, match="exists and cannot be continued yet: checkpoints are not available"):
            attempt(tmp_path, longer)
    assert snapshot(tmp_path) == before


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
    monkeypatch.setattr("sys.argv", ["griffin", "train", "my config.toml"])
    ranks = Ranks(rank=0, world_size=8, local_rank=0, address="a", port=1, source="slurm", store_served=False)
    environment = describe_environment(CONFIG, ranks, "cpu", {"norm": "torch"})
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

    monkeypatch.setattr(run_folder, "SOURCE", tmp_path.resolve())
    assert run_folder._git() is None
    git("init")
    (tmp_path / "code.py").write_text("")
    git("add", ".")
    git("commit", "-m", "code")
    assert run_folder._git() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "code.py").write_text("changed")
    assert run_folder._git() == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    (tmp_path / "installed").mkdir()
    monkeypatch.setattr(run_folder, "SOURCE", tmp_path.resolve() / "installed")
    assert run_folder._git() is None


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
    monkeypatch.setattr("griffin.trainer.console.time.monotonic", lambda: next(clock))
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

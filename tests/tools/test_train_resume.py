"""`griffin train` stopped or killed and restarted: signals, exit codes, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import griffin.launch.local
from griffin.parallel.world.ranks import STOPPED
from griffin.tools.cli import main
from griffin.trainer.checkpoint.manifest import verify
from griffin.trainer.checkpoint.steps import newest_complete
from griffin.trainer.run.attempts import read_end
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config
from tests.small_runs import (
    Watch,
    launch,
    metrics,
    notes,
    saved_files,
    saved_steps,
    series,
    signal_launcher,
    signal_this_process,
    snapshot,
    wait_for,
    write_config,
)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("stopped"))


@pytest.fixture(scope="module")
def config(config_path: Path) -> Config:
    settings = ["--train.dtype=bfloat16", "--train.micro_batch=4", "--log.interval=1", "--train.eval_interval=12"]
    return load_config(config_path, settings)


@pytest.fixture(scope="module")
def uninterrupted(config: Config, config_path: Path) -> Path:
    run_dir = config_path.parent / "uninterrupted"
    assert launch(2, config, run_dir) == 0
    return run_dir


@pytest.fixture(scope="module")
def stopped(config: Config, config_path: Path) -> Path:
    """A bfloat16 run that was stopped twice, and asked to stop again at its last step."""
    run_dir, folder = config_path.parent / "stopped", config_path.parent / "notes"
    signals = {
        "1": {(1, 2): partial(signal_launcher, os.getpid(), signal.SIGUSR1)},
        "2": {(1, 6): partial(signal_this_process, signal.SIGTERM)},
        "3": {(0, 11): partial(signal_this_process, signal.SIGTERM)},
    }
    codes = []
    for attempt, at_step in signals.items():
        (folder / attempt).mkdir(parents=True)
        codes.append(launch(2, config, run_dir, Watch(notes=folder / attempt, at_step=at_step)))
        assert saved_steps(run_dir)[-1] == max(series(run_dir, "loss"))  # the step that it stopped after
    assert codes == [STOPPED, STOPPED, 0]
    return run_dir


def test_stopped_twice_it_ends_as_if_never_stopped(stopped: Path, uninterrupted: Path) -> None:
    logged = [(line["attempt"], line["step"], line["loss"]) for line in metrics(stopped) if "loss" in line]
    first = max(step for attempt, step, _ in logged if attempt == 1)
    assert first in (2, 3)  # a signal to the launcher reaches one rank before step 2, the other perhaps after
    assert [attempt for attempt, _, _ in logged] == [1] * first + [2] * (7 - first) + [3] * 5
    assert {step: loss for _, step, loss in logged} == series(uninterrupted, "loss")
    assert series(stopped, "eval_loss") == series(uninterrupted, "eval_loss")
    assert saved_files(stopped, 12) == saved_files(uninterrupted, 12)
    ends = [read_end(RunFolder(stopped, attempt)) for attempt in (1, 2, 3)]
    assert [end and (end.why, end.exit_code, end.step) for end in ends] == [
        ("stopped", STOPPED, first),
        ("stopped", STOPPED, 7),
        ("finished", 0, 12),
    ]
    said = (stopped / "console.log").read_text()
    assert f"step {first}: asked to stop; saving" in said
    assert "step 7: asked to stop; saving" in said
    assert said.count("Stopped on request") == 2


def test_every_rank_stops_after_the_same_step(stopped: Path) -> None:
    folder = stopped.parent / "notes"
    ends = saved_steps(stopped)
    for attempt, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
        made = range(start + 1, end + 1)
        for rank in (0, 1):
            assert list(notes(folder / str(attempt), [rank])) == list(made)
        assert notes(folder / str(attempt), [0, 1]) == {step: list(range(8 * (step - 1), 8 * step)) for step in made}


def test_a_finished_run_started_again(stopped: Path) -> None:
    before = snapshot(stopped / "checkpoints")
    command = ["train", str(stopped / "config.toml"), "--run-dir", str(stopped), "--ranks", "2"]
    assert main(command) == 0
    assert snapshot(stopped / "checkpoints") == before
    assert (stopped / "console.log").read_text().endswith("Nothing is left to do: step 12 of 12 is saved.\n")


def test_another_model_is_refused_before_anything_starts(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **settings: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(griffin.launch.local, "run_local", fail)
    before = snapshot(stopped)
    command = ["train", str(stopped / "config.toml"), "--ranks", "2"]
    other = ["--model.width=64", '--model.pattern=["recurrent", "attention"]']
    differences = (
        "model.pattern is ['recurrent', 'attention', 'recurrent'] there, ['recurrent', 'attention'] here, "
        "model.width is 32 there, 64 here"
    )
    assert main([*command, "--run-dir", str(stopped), *other]) == 2
    refusal = f"--run-dir {stopped}: holds a run of another model ({differences}); choose another --run-dir"
    assert capsys.readouterr().err == f"griffin: error: {refusal}\n"
    for where in (stopped, stopped / "checkpoints", stopped / "checkpoints/step-00000012"):
        assert main([*command, "--run-dir", str(tmp_path / "run"), "--init-from", str(where), *other]) == 2
        refusal = f"{stopped}/checkpoints/step-00000012: holds another model ({differences})"
        assert capsys.readouterr().err == f"griffin: error: {refusal}\n"
    assert list(tmp_path.iterdir()) == []
    assert snapshot(stopped) == before


def session(number: int) -> list[int]:
    """Return the live processes of a session: a run's launcher, ranks, saving processes and data loaders."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, belongs_to = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        if int(belongs_to) == number and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_killed_twice_and_stopped_once_from_the_command_line(config_path: Path, tmp_path: Path) -> None:
    """Kill all processes at once; then only the launcher, during a save; then stop with SIGTERM."""
    settings = ["--train.steps=36", "--train.micro_batch=4", "--checkpoint.interval=4", "--log.interval=1"]
    settings += ["--data.workers=1", "--parallel.pipeline=2"]
    patience = 300.0  # seconds; from importing torch to the last step takes 15 on an idle machine
    command = [sys.executable, "-m", "griffin.tools.cli", "train", str(config_path), "--ranks", "2", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run_dir, other = tmp_path / "run", tmp_path / "uninterrupted"
    checkpoints = run_dir / "checkpoints"

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [*command, "--run-dir", str(run_dir)], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def has_made(step: int) -> bool:
        return (run_dir / "metrics.jsonl").exists() and max(series(run_dir, "loss"), default=0) >= step

    def end(moment: Callable[[], object], deed: Callable[[int], None], code: int) -> None:
        process = start()
        try:
            wait_for(moment, patience)
            deed(process.pid)
            assert process.wait(patience) == code
            wait_for(lambda: not session(process.pid))  # none outlives its launcher
        finally:
            for pid in session(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(patience)
        newest, damaged = newest_complete(checkpoints)
        assert newest is not None
        assert damaged == []
        verify(newest)

    def is_saving() -> bool:
        try:
            return any(checkpoints.glob("*.tmp/*/c*"))
        except FileNotFoundError:  # glob met a folder that was complete, and renamed, a moment later
            return False

    def kill_all(launcher: int) -> None:
        assert len(session(launcher)) >= 8  # launcher, its server and tracker, 2 ranks with a saver and a loader each
        for pid in session(launcher):
            with suppress(ProcessLookupError):  # it has ended with those killed before
                os.kill(pid, signal.SIGKILL)

    def kill_launcher(launcher: int) -> None:
        os.kill(launcher, signal.SIGKILL)

    def stop(launcher: int) -> None:
        os.kill(launcher, signal.SIGTERM)

    end(lambda: has_made(9), kill_all, -signal.SIGKILL)
    end(lambda: has_made(14) and is_saving(), kill_launcher, -signal.SIGKILL)
    end(lambda: has_made(21), stop, STOPPED)
    assert saved_steps(run_dir)[-1] == max(series(run_dir, "loss"))
    assert subprocess.run([*command, "--run-dir", str(run_dir)], env=environment, timeout=patience).returncode == 0
    assert subprocess.run([*command, "--run-dir", str(other)], env=environment, timeout=patience).returncode == 0
    expected = series(other, "loss")
    assert {line["attempt"] for line in metrics(run_dir)} == {1, 2, 3, 4}
    for line in metrics(run_dir):
        assert "loss" not in line or line["loss"] == expected[line["step"]]
    assert series(run_dir, "loss").keys() == expected.keys()
    assert saved_files(run_dir, 36) == saved_files(other, 36)

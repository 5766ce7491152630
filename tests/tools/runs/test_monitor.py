"""`griffin monitor`: run folders in every state."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from griffin.tools.cli import main
from griffin.tools.runs.monitor_view import render_run, render_runs, sparkline
from griffin.tools.runs.state import FAILED, FINISHED, GONE, HUNG, RUNNING, SILENT, STOPPED, RunReader, duration
from griffin.trainer.reporting.console import Console as Trainer
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.lock import Owner
from griffin.trainer.settings.complete import load_config
from tests.ranks import RankPool
from tests.small_runs import run, write_config


@pytest.fixture(scope="module")
def finished(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitored")
    rank_pool.run(run, 1, load_config(write_config(folder)), folder / "run")
    return folder / "run"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def shown(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert main(["monitor", *map(str, args)]) == 0
    return capsys.readouterr().out


def append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def lock(run_dir: Path, **changes: Any) -> Path:
    path = run_dir / "lock"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(Owner.current(), **changes))))
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, finished)
    state = RunReader(finished).read()
    assert (state.status, state.step, state.steps, state.attempt) == (FINISHED, 12, 12, 1)
    assert "\x1b" not in text, "plain lines where there is no terminal"
    assert f"{finished}  finished (" in text.replace("\n", "")
    for words in (
        "step 12 of 12 (100.0%), attempt 1",
        f"{state.figures['loss']:.4f} nats per token",
        f"{state.figures['eval_loss']:.4f} at step 12",
        f"{state.figures['tokens_per_second']:,.0f} tokens/s",
        "MFU",
        "forward-backward",
        "goodput",
        "0 skipped, 0 rewound",
        "step 12, ",
        "layer-00",
        "layer-02",
        "recurrence closed",
    ):
        assert words in text, words
    assert len(state.losses) == 4


def test_several_runs_have_a_line_each(finished: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock(run_dir)
    header, *lines = shown(capsys, finished, run_dir, "--once").splitlines()
    assert header.split() == ["run", "state", "step", "left", "loss", "eval", "tokens/s", "MFU", "goodput", "restarts"]
    text = " ".join(lines)
    assert "finished" in text
    assert "running" in text
    assert text.count("12/12") == 2


def test_the_state_of_a_locked_run(run_dir: Path) -> None:
    path, reader = lock(run_dir), RunReader(run_dir)
    assert reader.read().status == RUNNING
    # A lock of another machine: only its modification time shows whether it is alive.
    lock(run_dir, machine="elsewhere", host="n17", user="ada", job="cluster/4711")
    state = reader.read()
    assert state.status == RUNNING
    assert state.detail.startswith("ada on n17, job cluster/4711; last figures ")
    age(path, 100)
    state = reader.read()
    assert state.status == GONE
    assert "1 min 40 s ago" in state.detail
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    lock(run_dir, pid=process.pid)  # of this machine, and ended
    assert reader.read().status == GONE


def test_a_run_without_news_is_silent_and_then_hung(run_dir: Path) -> None:
    lock(run_dir)
    (run_dir / "metrics.jsonl").write_text("")
    append(run_dir / "metrics.jsonl", {"step": 3, "time": time.time() - 3700, "loss": 1.0, "step_seconds": 5.0})
    for name in ("console.log", "config.toml"):
        age(run_dir / name, 3700)
    reader = RunReader(run_dir)
    state = reader.read()
    assert (state.status, state.step) == (SILENT, 3)
    assert "1 h 1 min ago" in state.detail
    assert state.seconds_left == 45.0
    append(run_dir / "metrics.jsonl", {"step": 3, "time": time.time() - 3600, "step_seconds": 1000.0})
    assert reader.read().status == RUNNING, "its logged steps are 4000 s apart"
    report = run_dir / "hangs" / "step-00000004-attempt-1" / "report.txt"
    report.parent.mkdir(parents=True)
    report.write_text("HANG: step 4 takes more than 600 s\nRanks that lag:\n  rank 3 on n17\n\nWhere each rank is:\n")
    state = reader.read()
    assert state.status == HUNG
    assert list(state.hangs) == ["step-00000004-attempt-1"]
    assert list(state.hang) == ["HANG: step 4 takes more than 600 s", "Ranks that lag:", "  rank 3 on n17"]
    with (run_dir / "console.log").open("a") as file:  # as the watchdog does, before the process leaves
        file.write("HANG: step 4 takes more than 600 s\n")
    assert reader.read().status == HUNG
    lock(run_dir, process_started=1)
    assert reader.read().status == HUNG, "and ended"
    shutil.copy(run_dir / "config.toml", run_dir / "config.attempt-2.toml")
    lock(run_dir)
    assert reader.read().status == RUNNING, "the next attempt"


def test_a_run_without_lock_stopped_or_failed(run_dir: Path) -> None:
    (run_dir / "config.attempt-2.toml").write_text((run_dir / "config.toml").read_text().replace("= 12", "= 20"))
    reader = RunReader(run_dir)
    state = reader.read()
    assert (state.status, state.step, state.steps, state.attempt) == (STOPPED, 12, 20, 2)
    with (run_dir / "console.log").open("a") as file:
        file.write("Traceback (most recent call last):\n  somewhere\nNonFiniteError: step 13: loss nan\n")
    state = reader.read()
    assert (state.status, state.last_line) == (FAILED, "NonFiniteError: step 13: loss nan")
    with (run_dir / "console.log").open("a") as file:
        file.write(f"Run folder: {run_dir}, attempt 2\n")
    with pytest.raises(KeyboardInterrupt), Trainer(RunFolder(run_dir, 2), steps=20, stream=io.StringIO()):
        raise KeyboardInterrupt
    assert reader.read().status == STOPPED
    with pytest.raises(ConnectionError), Trainer(RunFolder(run_dir, 2), steps=20, stream=io.StringIO()):
        interrupted_and_cut_off()
    assert (state := reader.read()).status == STOPPED, "Ctrl-C, after which other ranks were not reached"
    assert state.last_line.startswith("Stopped by Ctrl-C")
    with (run_dir / "console.log").open("a") as file:
        file.write(f"Run folder: {run_dir}, attempt 2\nStopped on request\n")
    assert reader.read().status == STOPPED, "the attempt that failed was an earlier one"


def test_recorded_end_of_an_attempt(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, now = RunReader(run_dir), time.time()
    assert reader.read().status == FINISHED
    with (run_dir / "console.log").open("a") as file:
        file.write("Traceback (most recent call last):\n")
    assert reader.read().status == FINISHED, "whatever stands on the console"
    ended = {"attempt": 1, "ended": now - 100, "step": 12, "exit_code": 85, "why": "stopped"}
    append(run_dir / "attempts.jsonl", ended)
    state = reader.read()
    assert (state.status, state.detail) == (STOPPED, "1 min 40 s ago, exit code 85")
    append(run_dir / "attempts.jsonl", ended | {"why": "failed", "exit_code": 1, "error": "[red]: no\nmore"})
    state = reader.read()
    assert (state.status, state.detail) == (FAILED, "1 min 40 s ago, exit code 1: [red]: no")
    assert "exit code 1: [red]: no)" in shown(capsys, run_dir).replace("\n", "")
    append(run_dir / "attempts.jsonl", ended | {"why": "hung", "exit_code": 86})
    assert (reader.read().status, reader.read().detail) == (HUNG, "1 min 40 s ago, exit code 86")
    lock(run_dir)
    assert reader.read().status == HUNG, "its processes have not left yet"
    shutil.copy(run_dir / "config.toml", run_dir / "config.attempt-2.toml")
    assert reader.read().status == RUNNING, "the next attempt"
    append(run_dir / "attempts.jsonl", {"attempt": 2, "started": now})
    lock(run_dir, process_started=1)
    assert reader.read().status == GONE, "killed: it has said nothing of its end"


def test_a_run_without_attempts_file(run_dir: Path) -> None:
    (run_dir / "attempts.jsonl").unlink()
    state = RunReader(run_dir).read()
    assert (state.status, state.step) == (FINISHED, 12)
    with (run_dir / "console.log").open("a") as file:
        file.write(f"Run folder: {run_dir}\nTraceback (most recent call last):\n")
    assert RunReader(run_dir).read().status == FAILED


def interrupted_and_cut_off() -> None:
    try:
        raise KeyboardInterrupt
    finally:
        raise ConnectionError("closed by peer")


def test_no_loss_where_no_token_is_predicted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(run_dir / "metrics.jsonl", {"step": 16, "loss": 0.0, "loss_tokens": 0})
    append(run_dir / "metrics.jsonl", {"step": 16, "eval_loss": 0.0, "eval_loss_tokens": 0})
    text = shown(capsys, run_dir)
    assert text.count("no token was predicted") == 2
    assert "0.0000" not in text
    state = RunReader(run_dir).read()
    assert [step for step, _ in state.losses] == [1, 4, 8, 12]
    assert "0.0000" not in shown(capsys, run_dir, run_dir)
    append(run_dir / "metrics.jsonl", {"step": 20, "loss": 0.5, "loss_tokens": 256})
    assert shown(capsys, run_dir).count("no token was predicted") == 1


def test_invalid_lines_are_skipped(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd: dict[str, Any] = {
        "time": None,
        "loss": "low",
        "eval_loss": [1],
        "step_seconds": {},
        "grad_norm/mlp": "x",
        "mfu": None,
    }
    append(run_dir / "metrics.jsonl", {"step": 12} | odd)
    append(run_dir / "ledger.jsonl", {"time": "now", "step": None, "kind": ["[red]"]})
    (run_dir / "config.toml").write_text('train = 3\n[log]\ninterval = "often"\n')
    lock(run_dir)
    assert "not finite" in shown(capsys, run_dir)
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").mkdir()
    assert RunReader(run_dir).read().status == RUNNING
    reader = RunReader(run_dir)
    shutil.rmtree(run_dir)
    assert reader.read().detail == "its folder is gone"


def test_what_is_added_shows(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = RunReader(run_dir)
    before = reader.read()
    append(run_dir / "metrics.jsonl", {"step": 8, "attempt": 2, "time": time.time(), "loss": 0.5, "grad_norm": None})
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.')
    state = reader.read()
    assert [step for step, _ in before.losses] == [1, 4, 8, 12]
    assert [step for step, _ in state.losses] == [1, 4, 8], "the run has gone back"
    assert (state.step, state.figures["loss"], state.losses[-1]) == (8, 0.5, (8, 0.5))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('25}\n{"cut\n')
    assert reader.read().figures["loss"] == 0.25
    assert "not finite" in shown(capsys, run_dir)


def test_the_ledger_and_stragglers_show(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(
        run_dir / "ledger.jsonl",
        *({"time": time.time(), "step": step, "attempt": 1, "kind": "loss", "action": "skip"} for step in range(9)),
    )
    ranks = [{"rank": rank, "host": "n1", "work_seconds": 1.0, "ratio": 1 + rank / 10} for rank in range(6)]
    found = {"step": 8, "imbalance": 1.5, "hosts": [{"host": "n1", "ratio": 1.25}], "ranks": ranks}
    (run_dir / "stragglers.json").write_text(json.dumps(found))
    text = shown(capsys, run_dir)
    assert "Slowest: n1 1.25 x, rank 5 1.50 x, rank 4 1.40 x, rank 3 1.30 x" in text
    assert "step 8: loss, skip" in text
    assert "step 4: loss, skip" in text
    assert "step 3: loss, skip" not in text, "the last five"
    for damaged in ("{", "[]", '{"hosts": 1, "ranks": [1, {"ratio": "x"}]}'):
        (run_dir / "stragglers.json").write_text(damaged)
        assert "Slowest" not in shown(capsys, run_dir)


def test_a_terminal_shows_what_is_new_until_interrupted(run_dir: Path) -> None:
    terminal, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    command = [sys.executable, "-P", "-m", "griffin.tools.cli", "monitor", str(run_dir), "--interval", "0.05"]
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, env=environment) as process:
        os.close(theirs)
        try:
            read_until(terminal, "nats per token")
            append(run_dir / "metrics.jsonl", {"step": 12, "time": time.time(), "loss": 0.12345})
            read_until(terminal, "0.1235 nats per token")
            process.send_signal(signal.SIGINT)
            with suppress(OSError):  # EIO: it has closed the terminal
                while os.read(terminal, 4096):
                    pass
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
            os.close(terminal)


def test_a_narrow_terminal_shows_all_figures(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = RunReader(finished).read()
    for width in (60, 40):
        Console(width=width).print(render_run(state, width=width))
        text = " ".join(capsys.readouterr().out.split())
        for words in (f"loss {state.figures['loss']:.4f} nats", "goodput", "step time", "tokens/s"):
            assert words in text, (width, words)
    Console(width=80).print(render_runs([state]))
    assert f"{state.figures['tokens_per_second']:,.0f}" in capsys.readouterr().out


def read_until(terminal: int, words: str) -> None:
    seen, deadline = "", time.monotonic() + 60
    while words not in seen:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], seen
        seen += os.read(terminal, 4096).decode(errors="replace")


def test_a_run_that_has_only_begun(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(finished / "config.toml", tmp_path)
    text = shown(capsys, tmp_path)
    assert "not started" in text
    assert "step 0 of 12" in text
    lock(tmp_path)
    assert RunReader(tmp_path).read().status == RUNNING


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        ([str(tmp_path / "none")], "none: no such run folder"),
        ([str(tmp_path)], "not a run folder; it has no config.toml"),
        ([str(tmp_path), "--interval", "0"], "--interval 0.0: must be above 0"),
    ):
        assert main(["monitor", *words]) == 2
        assert expected in capsys.readouterr().err


def test_sparkline() -> None:
    assert sparkline([]) == sparkline([float("nan")]) == ""
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([1.0, 4.5, 8.0, float("inf")]) == "▁▅█"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (3600, "1 h"), (90061, "1 d 1 h"), (86400 * 20, "20 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text

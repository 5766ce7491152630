"""attempts.jsonl: what each way of ending writes, and how it is read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from griffin.parallel.world.ranks import HUNG as HUNG_CODE
from griffin.parallel.world.ranks import STOPPED as STOPPED_CODE
from griffin.trainer.run.attempts import FAILED, FINISHED, HUNG, STOPPED, Attempt, read_end
from griffin.trainer.run.folder import RunFolder


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.attempts.read_text().splitlines()]


def fail(error: BaseException) -> None:
    raise error


def interrupted_and_cut_off() -> None:
    try:
        raise KeyboardInterrupt
    finally:
        raise ConnectionError("closed by peer")


@pytest.mark.parametrize(
    ("end", "why", "exit_code", "error"),
    [
        (lambda attempt: None, FINISHED, 0, ""),
        (lambda attempt: setattr(attempt, "is_stopped", True), STOPPED, STOPPED_CODE, ""),
        (lambda attempt: fail(ValueError("no\nlong story" + "x" * 999)), FAILED, 1, "ValueError: no\nlong story"),
        (lambda attempt: fail(KeyboardInterrupt()), STOPPED, 130, ""),
        (lambda attempt: interrupted_and_cut_off(), STOPPED, 130, ""),
        (lambda attempt: fail(SystemExit(3)), FAILED, 1, "SystemExit: 3"),
    ],
    ids=["finished", "stopped", "failed", "interrupted", "interrupted and cut off", "left"],
)
def test_ends(tmp_path: Path, end: Callable[[Attempt], None], why: str, exit_code: int, error: str) -> None:
    folder = RunFolder(tmp_path, 2)
    begun = time.time()
    with suppress(ValueError, KeyboardInterrupt, ConnectionError, SystemExit), Attempt(folder, pytest.fail) as attempt:
        assert read_end(folder) is None
        attempt.step = 7
        end(attempt)
    first, last = lines(folder)
    assert first.keys() == {"attempt", "started"}
    assert begun - 0.001 <= first["started"] <= last["ended"] <= time.time() + 0.001
    found = read_end(folder)
    assert found is not None
    assert (found.why, found.exit_code, found.step, found.time) == (why, exit_code, 7, last["ended"])
    assert found.error.startswith(error)
    assert len(found.error) <= 500
    assert bool(found.error) == (why == FAILED)
    assert read_end(RunFolder(tmp_path, 1)) is None, "that of another attempt"


def test_a_hang(tmp_path: Path) -> None:
    attempt = Attempt(RunFolder(tmp_path), pytest.fail)
    attempt.step = 3
    attempt.hung()
    end = read_end(RunFolder(tmp_path))
    assert end is not None
    assert (end.why, end.exit_code, end.step) == (HUNG, HUNG_CODE, 3)


def test_unwritable_file_is_reported_and_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").mkdir()
    said: list[object] = []
    with Attempt(RunFolder(tmp_path), said.append):
        pass
    assert "attempts.jsonl cannot be written" in str(said[0])
    assert read_end(RunFolder(tmp_path)) is None


GOOD = {"attempt": 1, "ended": 5.0, "why": "stopped", "exit_code": 85, "step": 4}


@pytest.mark.parametrize(
    "odd",
    [
        {"ended": "now"},
        {"ended": float("nan")},
        {"why": ["stopped"]},
        {"why": "bored"},
        {"exit_code": 256},
        {"exit_code": None},
        {"step": -1},
        {"attempt": "1"},
    ],
    ids=str,
)
def test_damaged_lines_are_skipped(tmp_path: Path, odd: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path)
    folder.attempts.write_text(json.dumps(GOOD | odd) + "\n[1]\n{\n")
    assert read_end(folder) is None
    folder.attempts.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | odd) + "\n")
    end = read_end(folder)
    assert end is not None
    assert (end.why, end.step) == ("stopped", 4)

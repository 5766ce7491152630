from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from griffin.trainer.run.json_lines import Follower, lines_from_end


def append(path: Path, *values: object, end: str = "\n") -> None:
    with path.open("a") as file:
        file.write("\n".join(json.dumps(value) for value in values) + end)


@pytest.mark.parametrize("block", [7, 64, 2**20])
def test_lines_come_from_the_end(tmp_path: Path, block: int) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(lines_from_end(path)) == []
    append(path, *({"step": step, "é": "é" * step} for step in range(30)))
    with path.open("a") as file:
        file.write('{"step": 30, "lo\n[1]\n{"step": 31}\n{"step": 3')
    assert [line["step"] for line in lines_from_end(path, block=block)] == [31, *reversed(range(30))]


def test_follower_reads_appended_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.read() == []
    append(path, {"step": 1})
    append(path, {"step": 2}, end="")  # half a line, so far
    assert follower.read() == [{"step": 1}]
    append(path, end="\n")
    assert follower.read() == [{"step": 2}]
    assert follower.read() == []
    path.unlink()
    append(path, {"step": 5})
    assert follower.read() == [{"step": 5}]


def test_a_long_file_is_read_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, *({"step": step} for step in range(100_000)))
    follower = Follower(path, last=1000)
    steps = [line["step"] for line in follower.read()]
    assert steps == list(range(100_000 - len(steps), 100_000))
    assert 40 < len(steps) < 80


def test_long_lines_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 1}, {"step": "x" * 2000}, {"step": 2})
    assert list(lines_from_end(path, block=64, longest=1000)) == [{"step": 2}]
    follower = Follower(path, last=1000)
    assert follower.read() == [{"step": 2}]
    append(path, *({"step": step} for step in range(1000)))
    steps = [line["step"] for line in follower.read()]
    assert steps == list(range(1000 - len(steps), 1000))
    assert 40 < len(steps) < 90
    assert follower.read() == []


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    assert Follower(path).read() == []
    with pytest.raises(OSError, match="must be a regular file"):
        list(lines_from_end(path))

"""Traces of chosen steps on chosen ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from griffin.trainer.measuring.profile import StepProfiler


def profiled(folder: Path, rank: int) -> None:
    profiler = StepProfiler(folder, (2, 4), (0, 3), rank, torch.device("cpu"))
    for step in range(1, 6):
        with profiler.of(step):
            torch.ones(16, 16) @ torch.ones(16, 16)


def test_traces_of_chosen_steps_hold_their_operators(tmp_path: Path) -> None:
    profiled(tmp_path / "profiles", 3)
    profiled(tmp_path / "profiles", 1)
    files = sorted(tmp_path.glob("profiles/*"))
    assert [file.name for file in files] == [f"step-0000000{step}.rank-3.trace.json.gz" for step in (2, 4)]
    for file in files:
        with gzip.open(file, "rt") as lines:
            trace = json.load(lines)
        assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 1


def test_a_trace_that_is_there_is_kept(tmp_path: Path) -> None:
    trace = tmp_path / "step-00000002.rank-0.trace.json.gz"
    trace.write_bytes(b"of an earlier attempt")
    profiled(tmp_path, 0)
    assert trace.read_bytes() == b"of an earlier attempt"


def test_an_error_within_a_step_is_passed_on(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, (1,), (0,), 0, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="of the step"), profiler.of(1):
        raise RuntimeError("of the step")
    with profiler.of(1):  # and the profiler can start again
        pass
    assert list(tmp_path.glob("*.trace.json.gz"))

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from griffin.trainer.clock import StepClock, StepTimes


def slow_batches(seconds: float) -> Iterator[str]:
    while True:
        time.sleep(seconds)
        yield "batch"


def step(clock: StepClock, *, measure: bool, wait: float) -> StepTimes:
    """Two micro-batches, each waited for, computed for 0.02 s and sent for 0.03 s; then 0.02 s of reduction."""
    clock.begin(measure=measure)
    reduce = clock.before_reduction(lambda: time.sleep(0.02))
    for _ in islice(clock.timed(slow_batches(wait)), 2):
        for name, seconds in (("forward-compute", 0.02), ("forward-send", 0.03)):
            if clock.timers is not None:
                clock.timers(name, log_level=2).start()
            time.sleep(seconds)
            if clock.timers is not None:
                clock.timers(name).stop()
    reduce()
    clock.gradients_done()
    time.sleep(0.03)
    return clock.end()


def test_parts_of_a_step() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        begun = time.perf_counter()
        times = step(clock, measure=False, wait=0.05)
        wall = time.perf_counter() - begun
        assert times.data_wait >= 0.1
        assert times.forward_backward >= 0.12
        assert times.optimizer >= 0.03
        assert times.data_wait + times.forward_backward + times.optimizer == pytest.approx(wall, abs=0.05)
    assert clock.take_data_wait() >= 0.1
    assert clock.take_data_wait() == 0.0


def test_own_computation_is_without_sending_and_reduction() -> None:
    clock = StepClock(torch.device("cpu"))
    times = step(clock, measure=True, wait=0.0)
    compute, schedule = clock.own()
    assert compute >= 0.039
    assert schedule >= compute + 0.059
    assert times.forward_backward >= schedule + 0.019
    step(clock, measure=False, wait=0.0)
    assert clock.timers is None


def test_batches_end() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin(measure=False)
    assert list(clock.timed(iter("ab"))) == ["a", "b"]

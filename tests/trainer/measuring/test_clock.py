from __future__ import annotations

import time
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from griffin.trainer.health.rank_state import main_frames, where
from griffin.trainer.measuring.clock import RankTimes, StepClock, StepTimes, WorkClock


def slow_batches(seconds: float) -> Iterator[str]:
    while True:
        time.sleep(seconds)
        yield "batch"


def step(
    clock: StepClock, *, wait: float, inspection: float = 0.0, takes: bool = False
) -> tuple[StepTimes, RankTimes | None]:
    """A step of two micro-batches, each waited for, computed for 0.02 s and sent for 0.03 s; 0.02 s of reduction."""
    clock.begin()
    reduce = clock.before_reduction(lambda: time.sleep(0.02))
    batches = clock.timed(slow_batches(wait))
    with clock.work.running():
        for _ in range(2):
            clock.work("forward-compute", log_level=2).start()
            next(batches)
            time.sleep(0.02)
            clock.work("forward-compute").stop()
            clock.work("forward-send").start()
            time.sleep(0.03)
            clock.work("forward-send").stop()
        reduce()
    clock.gradients_done()
    time.sleep(inspection)
    with clock.waiting_for_device():
        pass
    own = clock.take() if takes else None
    time.sleep(0.03)
    return clock.end(), own


def test_parts_of_a_step() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        begun = time.perf_counter()
        times, _ = step(clock, wait=0.05)
        wall = time.perf_counter() - begun
        assert times.data_wait >= 0.1
        assert times.forward_backward >= 0.12
        assert times.optimizer >= 0.03
        assert times.data_wait + times.forward_backward + times.optimizer == pytest.approx(wall, abs=0.05)


def test_inspection_is_the_optimizers() -> None:
    times, _ = step(StepClock(torch.device("cpu")), wait=0.0, inspection=0.2)
    assert times.optimizer >= 0.23
    assert times.forward_backward < 0.2


def test_own_work_is_without_sending_and_reduction() -> None:
    clock = StepClock(torch.device("cpu"))
    times, own = step(clock, wait=0.01, takes=True)
    assert own is not None
    assert own.data_wait >= 0.02
    assert own.work >= own.data_wait + 0.039
    assert own.schedule >= own.work + 0.059
    assert times.data_wait + times.forward_backward >= own.schedule + 0.019


def test_own_work_is_a_mean_over_steps() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):  # what one call has taken is not in the next
        step(clock, wait=0.0)
        step(clock, wait=0.0)
        _, own = step(clock, wait=0.06, takes=True)
        assert own is not None
        assert 0.04 <= own.data_wait < 0.06
        assert own.data_wait + 0.039 <= own.work < own.data_wait + 0.1


def test_waits_for_other_ranks_are_not_own_work() -> None:
    clock = WorkClock(torch.device("cpu"))
    plain = torch.distributed.Work.wait
    slow_wait = mock.Mock(side_effect=lambda: time.sleep(0.2))
    with mock.patch.object(torch.distributed.Work, "wait", slow_wait), clock.running():
        timer = clock("forward-compute", log_level=2)
        timer.start()
        torch.distributed.Work.wait()  # type: ignore[call-arg]
        time.sleep(0.05)
        clock("forward-compute").stop()
    clock.add_up()
    work, _ = clock.take()
    assert 0.05 <= work < 0.15
    assert clock.take() == (0, 0)
    assert torch.distributed.Work.wait is plain


def test_evaluations_are_not_timed() -> None:
    clock = WorkClock(torch.device("cpu"))
    clock("backward-compute").start()
    time.sleep(0.01)
    clock("backward-compute").stop()
    clock.end_schedule()
    clock.add_up()
    assert clock.take() == (0, 0)


def test_events_do_not_gather_over_steps() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(3):
        step(clock, wait=0.0)
        assert (clock.work._work, clock.work._schedules) == ([], [])


def test_batches_end() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin()
    assert list(clock.timed(iter("ab"))) == ["a", "b"]


def test_clock_is_left_out_of_the_stack_of_a_waiting_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def waiting(work: object) -> None:
        frames = main_frames()
        inside = next(place for place, frame in enumerate(frames) if frame.f_code is waiting.__code__)
        said.append(where(frames[inside + 1 :]))

    monkeypatch.setattr(torch.distributed.Work, "wait", waiting)

    def caller() -> None:
        torch.distributed.Work.wait(None)  # type: ignore[arg-type]

    with WorkClock(torch.device("cpu")).running():
        caller()
    assert said[0].startswith("caller (")

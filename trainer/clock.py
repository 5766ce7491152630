"""Where the time of a rank's steps goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step on this rank; what its wall time holds besides is the loop's."""

    data_wait: float  # blocked on the next micro-batch
    forward_backward: float  # the rest of the schedule, the reduction of gradients and the sum of losses
    optimizer: float


class StepClock:
    """Times the parts of a step, and in steps that are measured this rank's own computation.

    A step costs a few readings of the host's clock. It reads them where the training waits for the device anyway, so
    that they hold on GPUs too, but for the optimizer's end: that is an event, read when the next step has waited. What
    the device still did for the optimizer after the host had gone on is counted to the optimizer of that next step.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans = _Spans(device)
        self._tail: tuple[Any, Any, float] | None = None  # the last optimizer's events, and what the host took
        self._waited, self._steps = 0.0, 0  # data wait of the steps since `take_data_wait`
        self._wait = 0.0  # of this step

    def begin(self, *, measure: bool) -> None:
        self._wait = 0.0
        self._begun = time.perf_counter()
        self._spans.begin(measure)

    @property
    def timers(self) -> Callable[..., Any] | None:
        """What this step is to have as `timers` in megatron-core's configuration."""
        return self._spans if self._spans.measure else None

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time that they are waited for is noted."""
        return _Timed(batches, self._add_wait)

    def before_reduction(self, reduce: Callable[..., None]) -> Callable[..., None]:
        """`reduce`, called where a rank's schedule ends; its beginning is noted."""

        def noted(*args: Any, **kwargs: Any) -> None:
            self._spans.end_schedule()
            reduce(*args, **kwargs)

        return noted

    def gradients_done(self) -> None:
        """The gradients and the loss are there, and the device has nothing left to do."""
        self._optimizer_begun = time.perf_counter()
        self._late = 0.0
        if self._tail is not None:
            begun, ended, host = self._tail
            self._late = max(0.0, begun.elapsed_time(ended) / 1e3 - host)
        self._event = _event() if self._on_gpu else None

    def end(self) -> StepTimes:
        host = time.perf_counter() - self._optimizer_begun
        if self._on_gpu:
            self._tail = (self._event, _event(), host)
        self._waited += self._wait
        self._steps += 1
        schedule = self._optimizer_begun - self._begun - self._wait
        late = min(self._late, schedule)
        return StepTimes(data_wait=self._wait, forward_backward=schedule - late, optimizer=host + late)

    def take_data_wait(self) -> float:
        """Mean seconds per step, over the steps since the last call."""
        mean = self._waited / max(self._steps, 1)
        self._waited, self._steps = 0.0, 0
        return mean

    def own(self) -> tuple[float, float]:
        """(this rank's forward and backward computation, its schedule), seconds of a measured step without data waits.

        The schedule ends before gradients are reduced over data-parallel ranks; what it has beyond the computation is
        waiting for, and sending to, other pipeline stages. Call after `gradients_done`.
        """
        compute, schedule = self._spans.seconds()
        return max(0.0, compute - self._wait), max(0.0, schedule - self._wait)

    def _add_wait(self, seconds: float) -> None:
        self._wait += seconds


class _Timed(Generic[T]):
    def __init__(self, batches: Iterator[T], add: Callable[[float], None]):
        self._batches, self._add = batches, add

    def __iter__(self) -> _Timed[T]:
        return self

    def __next__(self) -> T:
        begun = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._add(time.perf_counter() - begun)


class _Spans:
    """The part of megatron-core's interface of timers that says when a rank computes."""

    NAMES = ("forward-compute", "backward-compute")

    def __init__(self, device: torch.device):
        self._mark: Callable[[], Any] = _event if device.type == "cuda" else time.perf_counter
        self.measure = False

    def begin(self, measure: bool) -> None:
        self.measure = measure
        self._marks: list[Any] = []  # of computations: start, stop, start, stop, ...
        self._schedule = [self._mark()] if measure else []

    def end_schedule(self) -> None:
        if self.measure:
            self._schedule.append(self._mark())

    def seconds(self) -> tuple[float, float]:
        assert self.measure, "this step was not measured"
        assert len(self._schedule) == 2, "the schedule has ended"
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return sum(_between(*pair) for pair in pairs), _between(self._schedule[0], self._schedule[1])

    def __call__(self, name: str, log_level: int | None = None) -> _Span:
        return _Span(lambda: self._marks.append(self._mark()) if name in self.NAMES else None)


class _Span:
    def __init__(self, note: Callable[[], None]):
        self._note = note

    def start(self, barrier: bool = False) -> None:
        self._note()

    def stop(self, barrier: bool = False) -> None:
        self._note()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, stop: Any) -> float:
    return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1e3

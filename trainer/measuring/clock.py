"""Where the time of a rank's steps goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from griffin.trainer.health.rank_state import transparent

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step on this rank; what its wall time holds besides is the loop's."""

    data_wait: float  # blocked on the next micro-batch
    forward_backward: float  # the rest of the schedule, the reduction of gradients and the sum of losses
    optimizer: float


@dataclass(frozen=True, kw_only=True)
class Own:
    """Seconds of this rank per step, means over some steps."""

    data_wait: float  # blocked on micro-batches
    work: float  # forward and backward passes, with waiting for their data and without waiting for other ranks
    schedule: float  # from its beginning to where gradients are reduced over data-parallel ranks


class StepClock:
    """Times the parts of every step, and this rank's own work in it.

    A step costs a few readings of the host's clock. It reads them where the training waits for the device anyway, so
    that they hold on GPUs too, but for the optimizer's end: that is an event, read when the next step has waited. What
    the device still did for the optimizer after the host had gone on is counted to the optimizer of that next step.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.work = WorkClock(device)
        self._tail: tuple[Any, Any, float] | None = None  # the last optimizer's events, and what the host took
        self._waited, self._steps = 0.0, 0  # data wait of the steps since `take`
        self._wait = 0.0  # of this step

    def begin(self) -> None:
        self._wait = 0.0
        self._begun = time.perf_counter()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time that they are waited for is noted."""
        return _Timed(batches, self._add_wait)

    def before_reduction(self, reduce: Callable[..., None]) -> Callable[..., None]:
        """`reduce`, called where a rank's schedule ends; its beginning is noted."""

        def noted(*args: Any, **kwargs: Any) -> None:
            self.work.end_schedule()
            reduce(*args, **kwargs)

        return noted

    def gradients_done(self) -> None:
        """The gradients and the loss are there, and the device has nothing left to do."""
        self._optimizer_begun = time.perf_counter()
        self.work.add_up()
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

    def take(self) -> Own:
        """Of the steps since the last call, of which there was one at least, up to the one under way.

        Call between `gradients_done` and `end`.
        """
        steps, waited = self._steps + 1, self._waited + self._wait
        self._waited, self._steps = -self._wait, -1  # `end` adds those of this step
        work, schedule = self.work.take()
        return Own(data_wait=waited / steps, work=work / steps, schedule=schedule / steps)

    def _add_wait(self, seconds: float) -> None:
        self._wait += seconds


class WorkClock:
    """Times this rank's own work within `running`. It is megatron-core's `config.timers`, as far as it needs to be.

    On a CPU, waits for other ranks are the blocking calls of torch.distributed, which are taken off. On a GPU, passes
    are timed on the device, between events: tensor-parallel ranks wait for each other within a pass, and have one time.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._is_running = False
        self._waited = 0.0  # for other ranks
        self._work: list[tuple[Any, Any]] = []  # when passes began and ended, since `add_up`
        self._schedules: list[tuple[Any, Any]] = []
        self._seconds = [0.0, 0.0]  # of work and of schedules, before that
        self._timers: dict[str, Any] = {name: _Timer(self) for name in ("forward-compute", "backward-compute")}

    def __call__(self, name: str, log_level: int = 0) -> Any:
        return self._timers.get(name, _NO_TIMER) if self._is_running else _NO_TIMER

    @contextmanager
    def running(self) -> Iterator[None]:
        """A step's schedule; evaluations are not timed."""
        self._is_running = True
        self._begun = self._mark(time.perf_counter())
        plain = dist.Work.wait
        if not self._on_gpu:
            dist.Work.wait = self._timed(plain)  # type: ignore[method-assign]
        try:
            yield
        finally:
            dist.Work.wait = plain  # type: ignore[method-assign]
            self._is_running = False

    def end_schedule(self) -> None:
        if self._is_running:
            self._schedules.append((self._begun, self._mark(time.perf_counter())))

    def add_up(self) -> None:
        """Let go of the events of a step. On a GPU all of them must have passed."""
        for place, pairs in enumerate((self._work, self._schedules)):
            self._seconds[place] += sum(_between(*pair) for pair in pairs)
            pairs.clear()

    def take(self) -> tuple[float, float]:
        """Seconds of work and of schedules since the last call, up to the last `add_up`."""
        work, schedule = self._seconds
        self._seconds = [0.0, 0.0]
        return work, schedule

    def _mark(self, now: float) -> Any:
        return _event() if self._on_gpu else now

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        @transparent
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return wait(*args, **kwargs)
            finally:
                self._waited += time.perf_counter() - begun

        return timed


class _Timer:
    """One of megatron-core's timers: a pass of a micro-batch."""

    def __init__(self, clock: WorkClock) -> None:
        self._clock = clock
        self._begun: Any = None

    def start(self, barrier: bool = False) -> None:
        self._begun = self._now()

    def stop(self, barrier: bool = False) -> None:
        self._clock._work.append((self._begun, self._now()))

    def _now(self) -> Any:
        return self._clock._mark(time.perf_counter() - self._clock._waited)


class _NoTimer:
    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


_NO_TIMER = _NoTimer()


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


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, stop: Any) -> float:
    return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1e3

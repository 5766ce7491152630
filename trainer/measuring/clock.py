"""Time of the parts of a step: data wait, forward and backward passes, optimizer, and a rank's own work."""

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
    """Seconds of one step on this rank. The rest of its wall time is spent in the training loop."""

    data_wait: float  # waiting for micro-batches
    forward_backward: float  # the rest of the pipeline schedule, the reduction of gradients and the sum of losses
    optimizer: float


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Seconds per step on this rank, means over some steps."""

    data_wait: float  # waiting for micro-batches
    work: float  # own work: forward and backward passes with their data wait, without waits for other ranks
    schedule: float  # from the start of the pipeline schedule to the reduction of gradients over data-parallel ranks


class StepClock:
    """Times the parts of every step, and this rank's own work in it.

    It reads the host's clock at the start and end of a step and where the training waits for the device anyway, so that
    the times are right on GPUs without further synchronization. What lies between is timed by CUDA events: those up to
    that wait are read after it, the end of the optimizer in the next step. Device time of the optimizer after the host
    has gone on counts to that next step.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.work = WorkClock(device)
        self._last_optimizer: tuple[Any, Any, float] | None = None  # start and end events, and seconds of the host
        self._data_wait_sum, self._steps = 0.0, 0  # of the steps since `take`
        self._data_wait = 0.0  # of this step

    def begin(self) -> None:
        self._data_wait = 0.0
        self._start = time.perf_counter()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time that the training waits for them is measured."""
        return _TimedBatches(batches, self._add_data_wait)

    def before_reduction(self, reduce: Callable[..., None]) -> Callable[..., None]:
        """Wrap the function that reduces gradients, with which this rank's pipeline schedule ends."""

        def end_schedule_and_reduce(*args: Any, **kwargs: Any) -> None:
            self.work.end_schedule()
            reduce(*args, **kwargs)

        return end_schedule_and_reduce

    def gradients_done(self) -> None:
        """Call this when gradients and loss are computed, or on a GPU, when this has been launched."""
        self._gradients_end = _mark(self._on_gpu)

    @contextmanager
    def waiting_for_device(self) -> Iterator[None]:
        """Wait for the device within, once a step: after what is computed of the gradients before the update."""
        inspected = _mark(self._on_gpu)
        yield
        self._optimizer_start = time.perf_counter()
        self._inspection = _between(self._gradients_end, inspected)
        self.work.add_up()
        self._late_optimizer = 0.0
        if self._last_optimizer is not None:
            start, end, host = self._last_optimizer
            self._late_optimizer = max(0.0, start.elapsed_time(end) / 1e3 - host)
        self._optimizer_event = _event() if self._on_gpu else None

    def end(self) -> StepTimes:
        """The times of this step. Call it when the host is done with the optimizer."""
        host = time.perf_counter() - self._optimizer_start
        if self._on_gpu:
            self._last_optimizer = (self._optimizer_event, _event(), host)
        self._data_wait_sum += self._data_wait
        self._steps += 1
        schedule = self._optimizer_start - self._start - self._data_wait - self._inspection
        late = min(self._late_optimizer, schedule)
        optimizer = self._inspection + host + late
        return StepTimes(data_wait=self._data_wait, forward_backward=schedule - late, optimizer=optimizer)

    def take(self) -> RankTimes:
        """Means over the steps since the last call, this step included.

        Call it between `waiting_for_device` and `end`.
        """
        steps, data_wait = self._steps + 1, self._data_wait_sum + self._data_wait
        self._data_wait_sum, self._steps = -self._data_wait, -1  # `end` adds those of this step
        work, schedule = self.work.take()
        return RankTimes(data_wait=data_wait / steps, work=work / steps, schedule=schedule / steps)

    def _add_data_wait(self, seconds: float) -> None:
        self._data_wait += seconds


class WorkClock:
    """Times this rank's own work within `running`. It stands in for megatron-core's `config.timers`.

    On a CPU, the time of blocking calls of torch.distributed, which wait for other ranks, is subtracted. On a GPU,
    passes are timed on the device, between events. There, tensor-parallel ranks wait for each other within a pass, so
    that their times are equal.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._is_running = False
        self._waited = 0.0  # for other ranks
        self._work: list[tuple[Any, Any]] = []  # start and end of each pass since `add_up`
        self._schedules: list[tuple[Any, Any]] = []  # likewise of schedules
        self._seconds = [0.0, 0.0]  # of work and of schedules, up to `add_up`
        self._timers: dict[str, Any] = {name: _Timer(self) for name in ("forward-compute", "backward-compute")}

    def __call__(self, name: str, log_level: int = 0) -> Any:
        return self._timers.get(name, _NO_TIMER) if self._is_running else _NO_TIMER

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what runs within: the schedule of a training step. Evaluations are not timed."""
        self._is_running = True
        self._start = _mark(self._on_gpu)
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
            self._schedules.append((self._start, _mark(self._on_gpu)))

    def add_up(self) -> None:
        """Turn a step's events into seconds. On a GPU, all of them must have passed."""
        for index, pairs in enumerate((self._work, self._schedules)):
            self._seconds[index] += sum(_between(*pair) for pair in pairs)
            pairs.clear()

    def take(self) -> tuple[float, float]:
        """Seconds of work and of schedules since the last call, up to the last `add_up`."""
        work, schedule = self._seconds
        self._seconds = [0.0, 0.0]
        return work, schedule

    def now(self) -> Any:
        """A CUDA event; on a CPU, seconds without those waited for other ranks."""
        return _event() if self._on_gpu else time.perf_counter() - self._waited

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        @transparent
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(*args, **kwargs)
            finally:
                self._waited += time.perf_counter() - start

        return timed


class _Timer:
    """Stands in for one of megatron-core's timers, of the forward or backward pass of a micro-batch."""

    def __init__(self, clock: WorkClock) -> None:
        self._clock = clock
        self._start: Any = None

    def start(self, barrier: bool = False) -> None:
        self._start = self._clock.now()

    def stop(self, barrier: bool = False) -> None:
        self._clock._work.append((self._start, self._clock.now()))


class _NoTimer:
    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


_NO_TIMER = _NoTimer()


class _TimedBatches(Generic[T]):
    def __init__(self, batches: Iterator[T], add: Callable[[float], None]):
        self._batches, self._add = batches, add

    def __iter__(self) -> _TimedBatches[T]:
        return self

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._add(time.perf_counter() - start)


def _mark(on_gpu: bool) -> Any:
    return _event() if on_gpu else time.perf_counter()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, stop: Any) -> float:
    return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1e3

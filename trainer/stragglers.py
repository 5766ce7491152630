"""Which ranks are slower than others at the same work.

Ranks wait for one another all the time, so that each one's step takes as long as the slowest's. What is measured is a
rank's own work: its forward and backward passes, waiting for their data included, without the waits for other ranks. On
a CPU those are the blocking calls of torch.distributed. On a GPU the passes are timed on the device, between events,
where tensor-parallel ranks wait for each other within a pass: a slow one shows as its tensor group.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from griffin.parallel.grid import Grid

SLOW = 1.2  # times the median of the ranks with the same work
PATIENCE = 3  # logged steps in a row after which a slow rank is worth a line
NAMED = 8  # slow ranks that a line names
TIMED = ("forward-compute", "backward-compute")  # megatron-core's names


class WorkClock:
    """Times this rank's own work within `running`. It is megatron-core's `config.timers`, as far as it needs to be."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._is_running = False
        self._seconds = self._waited = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._timers: dict[str, Any] = {name: _Timer(self) for name in TIMED}

    def __call__(self, name: str, log_level: int = 0) -> Any:
        return self._timers.get(name, _NO_TIMER) if self._is_running else _NO_TIMER

    @contextmanager
    def running(self) -> Iterator[None]:
        self._is_running = True
        try:
            if self._on_gpu:
                yield
            else:
                with mock.patch.object(dist.Work, "wait", self._timed(dist.Work.wait)):
                    yield
        finally:
            self._is_running = False

    def take(self) -> float:
        """Seconds of work since the last call. On a GPU it waits for what is under way."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._pairs) / 1e3
            self._pairs.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return wait(*args, **kwargs)
            finally:
                self._waited += time.perf_counter() - begun

        return timed


class _Timer:
    def __init__(self, clock: WorkClock) -> None:
        self._clock = clock
        self._begun: Any = None

    def start(self, barrier: bool = False) -> None:
        if self._clock._on_gpu:
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()
        else:
            self._begun = time.perf_counter() - self._clock._waited

    def stop(self, barrier: bool = False) -> None:
        if self._clock._on_gpu:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._clock._pairs.append((self._begun, end))
        else:
            self._clock._seconds += time.perf_counter() - self._clock._waited - self._begun


class _NoTimer:
    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


_NO_TIMER = _NoTimer()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks are numbered tensor first, then data, then pipeline."""

    tensor: int
    data: int
    pipeline: int

    def peers(self, rank: int) -> range:
        """The ranks that do as much work as `rank`: those of its pipeline stages."""
        size = self.tensor * self.data
        return range(rank // size * size, (rank // size + 1) * size)

    def replicas(self) -> list[list[int]]:
        """The ranks of each data-parallel replica."""
        return [
            [t + self.tensor * (d + self.data * p) for p in range(self.pipeline) for t in range(self.tensor)]
            for d in range(self.data)
        ]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Own work of all ranks over the last steps."""

    step: int
    seconds: tuple[float, ...]  # of each rank, per step
    layout: Layout
    hosts: tuple[str, ...]  # of each rank

    @property
    def imbalance(self) -> float:
        """The slowest data-parallel replica over the median one; a replica is as slow as its slowest rank."""
        times = [max(self.seconds[rank] for rank in ranks) for ranks in self.layout.replicas()]
        return max(times) / _positive(statistics.median_low(times))

    def ratio(self, rank: int) -> float:
        """A rank's time over the median of the ranks with the same work; of two, over the faster one's."""
        median = statistics.median_low([self.seconds[peer] for peer in self.layout.peers(rank)])
        return self.seconds[rank] / _positive(median)

    def slow(self) -> set[int]:
        return {rank for rank in range(len(self.seconds)) if self.ratio(rank) > SLOW}

    def slowest_hosts(self) -> list[tuple[str, float]]:
        """(host, mean ratio of its ranks), the slowest first."""
        ratios: dict[str, list[float]] = {}
        for rank, host in enumerate(self.hosts):
            ratios.setdefault(host, []).append(self.ratio(rank))
        return sorted(((host, statistics.fmean(held)) for host, held in ratios.items()), key=lambda found: -found[1])

    def write(self, path: Path) -> None:
        """As JSON, in the place of what an earlier step left. What cannot be written is lost."""
        found = {
            "step": self.step,
            "imbalance": round(self.imbalance, 4),
            "hosts": [{"host": host, "ratio": round(ratio, 4)} for host, ratio in self.slowest_hosts()],
            "ranks": [
                {"rank": rank, "host": host, "work_seconds": seconds, "ratio": round(self.ratio(rank), 4)}
                for rank, (host, seconds) in enumerate(zip(self.hosts, self.seconds, strict=True))
            ],
        }
        beside = path.with_name(f".{path.name}.tmp")
        with suppress(OSError):
            beside.write_text(json.dumps(found) + "\n", encoding="utf-8")
            os.replace(beside, path)


class Stragglers:
    """Measures all ranks' own work, made and called by all ranks alike."""

    def __init__(self, grid: Grid, path: Path) -> None:
        self.clock = WorkClock(grid.device)
        self._grid, self._path = grid, path
        self._layout = Layout(tensor=grid.tensor_size, data=grid.data_size, pipeline=grid.pipeline_size)
        self._hosts = tuple(grid.all_gather(socket.gethostname()))
        self._steps = 0
        self._slow: dict[int, int] = {}  # rank -> logged steps in a row in which it was slow
        self._told: set[int] = set()

    @contextmanager
    def step(self) -> Iterator[None]:
        with self.clock.running():
            yield
        self._steps += 1

    def measure(self, step: int) -> Work:
        """Work per step since the last call, of which there was one at least. A collective of all ranks."""
        mine = torch.tensor([self.clock.take() / self._steps], dtype=torch.float64, device=self._grid.device)
        self._steps = 0
        everyone = mine.new_empty(self._grid.world_size)
        dist.all_gather_into_tensor(everyone, mine)
        work = Work(step=step, seconds=tuple(everyone.tolist()), layout=self._layout, hosts=self._hosts)
        if self._grid.is_first_rank and self._grid.world_size > 1:
            work.write(self._path)
        return work

    def complaint(self, work: Work) -> str | None:
        """A line about ranks that have been slow PATIENCE logged steps in a row, once for as long as they are."""
        slow = work.slow()
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        found = {rank for rank, times in self._slow.items() if times >= PATIENCE}
        news, self._told = found - self._told, found
        return _describe(work, sorted(found, key=lambda rank: -work.ratio(rank))) if news else None


def _describe(work: Work, ranks: Sequence[int]) -> str:
    named = "; ".join(
        f"rank {rank} on {work.hosts[rank]}: {work.ratio(rank):.2f}x the median of its peers "
        f"({work.seconds[rank]:.3f} s of work per step)"
        for rank in ranks[:NAMED]
    )
    more = f"; and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"step {work.step}: stragglers: {named}{more}"


def _positive(seconds: float) -> float:
    return max(seconds, 1e-9)

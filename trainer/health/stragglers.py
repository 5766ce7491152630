"""Which ranks are slower than others at the same work.

Ranks wait for one another all the time, so that each one's step takes as long as the slowest's. What counts is a rank's
own work, as `trainer.measuring.clock.WorkClock` has it.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from griffin.parallel.world.axes import Axes, rank_name
from griffin.parallel.world.grid import Grid

SLOW = 1.2  # times the median of the ranks with the same work
PATIENCE = 3  # logged steps in a row after which a slow rank is worth a line
NAMED = 8  # slow ranks that a line names


@dataclass(frozen=True, kw_only=True)
class Work:
    """Own work of all ranks over the last steps."""

    step: int
    seconds: tuple[float, ...]  # of each rank, per step
    axes: Axes
    hosts: tuple[str, ...]  # of each rank

    def ratio(self, rank: int) -> float:
        """A rank's time over the median of the ranks with the same work; of two, over the faster one's."""
        return self.seconds[rank] / self._medians[self._stage(rank)]

    @cached_property
    def _medians(self) -> dict[int, float]:
        """Of the ranks of each stage; once, since training waits for what is made of these figures."""
        stages: dict[int, list[float]] = {}
        for rank, seconds in enumerate(self.seconds):
            stages.setdefault(self._stage(rank), []).append(seconds)
        return {stage: _positive(statistics.median_low(held)) for stage, held in stages.items()}

    def _stage(self, rank: int) -> int:
        """The ranks of the same pipeline stages do as much work as one another."""
        return self.axes.coordinate(rank, "pipeline")

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
    """What rank 0 says of the ranks' own work. Made by all ranks alike."""

    def __init__(self, grid: Grid, path: Path) -> None:
        self._path = path
        self._axes = grid.axes
        self._hosts = tuple(grid.all_gather(socket.gethostname(), str))
        self._slow: dict[int, int] = {}  # rank -> logged steps in a row in which it was slow
        self._told: set[int] = set()

    def note(self, step: int, seconds: Sequence[float]) -> str | None:
        """Write down the work of a logged step, of every rank. The line that it is worth, if any; see `complaint`."""
        if len(seconds) == 1:
            with suppress(OSError):  # of an earlier attempt on more ranks
                self._path.unlink(missing_ok=True)
            return None
        work = Work(step=step, seconds=tuple(seconds), axes=self._axes, hosts=self._hosts)
        work.write(self._path)
        return self.complaint(work)

    def complaint(self, work: Work) -> str | None:
        """A line about ranks that have been slow PATIENCE logged steps in a row, once for as long as they are."""
        slow = work.slow()
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        found = {rank for rank, times in self._slow.items() if times >= PATIENCE}
        news, self._told = found - self._told, found
        return _describe(work, sorted(found, key=lambda rank: -work.ratio(rank))) if news else None


def _describe(work: Work, ranks: Sequence[int]) -> str:
    named = "; ".join(
        f"{rank_name(rank, work.hosts[rank])}: {work.ratio(rank):.2f}x the median of its peers "
        f"({work.seconds[rank]:.3f} s of work per step)"
        for rank in ranks[:NAMED]
    )
    more = f"; and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"step {work.step}: stragglers: {named}{more}"


def _positive(seconds: float) -> float:
    return max(seconds, 1e-9)

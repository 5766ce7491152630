"""Stragglers: ranks that are slower than others at the same work.

Ranks wait for each other, so that each step takes as long on all ranks as on the slowest. They are therefore compared
by their own work, as measured by `trainer.measuring.clock.WorkClock`.
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

SLOW = 1.2  # slow ranks take longer than this times the median of the ranks with the same work
PATIENCE = 3  # logged steps in a row after which a slow rank is reported
NAMED = 8  # most ranks that a line names


@dataclass(frozen=True, kw_only=True)
class Work:
    """The time that own work takes on each rank, as a mean over the last steps."""

    step: int
    seconds: tuple[float, ...]  # per step, of each rank
    axes: Axes
    hosts: tuple[str, ...]  # of each rank

    def ratio(self, rank: int) -> float:
        """A rank's time divided by the median of the ranks with the same work; of two ranks, by the faster one's."""
        return self.seconds[rank] / self._medians[self._stage(rank)]

    @cached_property
    def _medians(self) -> dict[int, float]:
        """Median time of the ranks of each stage. Cached, since training waits for this."""
        stages: dict[int, list[float]] = {}
        for rank, seconds in enumerate(self.seconds):
            stages.setdefault(self._stage(rank), []).append(seconds)
        return {stage: _positive(statistics.median_low(held)) for stage, held in stages.items()}

    def _stage(self, rank: int) -> int:
        """The pipeline rank: ranks with the same one do the same amount of work."""
        return self.axes.coordinate(rank, "pipeline")

    def slow(self) -> set[int]:
        return {rank for rank in range(len(self.seconds)) if self.ratio(rank) > SLOW}

    def slowest_hosts(self) -> list[tuple[str, float]]:
        """(host, mean ratio of its ranks), slowest first."""
        ratios: dict[str, list[float]] = {}
        for rank, host in enumerate(self.hosts):
            ratios.setdefault(host, []).append(self.ratio(rank))
        return sorted(((host, statistics.fmean(held)) for host, held in ratios.items()), key=lambda found: -found[1])

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically replacing the file. If it cannot be written, nothing is raised."""
        found = {
            "step": self.step,
            "hosts": [{"host": host, "ratio": round(ratio, 4)} for host, ratio in self.slowest_hosts()],
            "ranks": [
                {"rank": rank, "host": host, "work_seconds": seconds, "ratio": round(self.ratio(rank), 4)}
                for rank, (host, seconds) in enumerate(zip(self.hosts, self.seconds, strict=True))
            ],
        }
        temporary = path.with_name(f".{path.name}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
            os.replace(temporary, path)


class Stragglers:
    """Records each rank's own work and reports slow ranks. Created on all ranks; rank 0 records."""

    def __init__(self, grid: Grid, path: Path) -> None:
        self._path = path
        self._axes = grid.axes
        self._hosts = tuple(grid.all_gather(socket.gethostname(), str))
        self._slow: dict[int, int] = {}  # rank -> logged steps in a row in which it was slow
        self._reported: set[int] = set()

    def record(self, step: int, seconds: Sequence[float]) -> str | None:
        """Record the work of a logged step, seconds of each rank. Returns a line to print, or None (see `report`)."""
        if len(seconds) == 1:
            with suppress(OSError):  # left by an earlier attempt on more ranks
                self._path.unlink(missing_ok=True)
            return None
        work = Work(step=step, seconds=tuple(seconds), axes=self._axes, hosts=self._hosts)
        work.write(self._path)
        return self.report(work)

    def report(self, work: Work) -> str | None:
        """A line about ranks that were slow for PATIENCE logged steps in a row; once until they are no longer slow."""
        slow = work.slow()
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        found = {rank for rank, times in self._slow.items() if times >= PATIENCE}
        new, self._reported = found - self._reported, found
        return _describe(work, sorted(found, key=lambda rank: -work.ratio(rank))) if new else None


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

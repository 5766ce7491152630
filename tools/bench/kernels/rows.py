"""The rows of the tables of `griffin bench kernels`, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from griffin.tools.bench.kernels.floors import Counted
    from griffin.tools.bench.kernels.recurrences import Shape

GOALS = ((32768, 1.25), (4096, 1.6))  # (least B R, most time over the byte floor) of the RG-LRU without branch
COLUMNS = f"{'':<16}{'path':<22}{'forward':>12}{'backward':>12}{'GB/s':>8}{'of copy':>9}{'over floor':>12}"
RANK_COLUMNS = f"{'':<22}{'forward':>12}{'backward':>12}{'GB/s':>8}{'TFLOP/s':>9}{'floor':>12}{'over floor':>12}"


@dataclass(frozen=True)
class Times:
    """Medians in milliseconds."""

    forward: float
    backward: float  # 0 of an operation that has none

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Row:
    """The measurement of one operation and shape."""

    operation: str
    shape: Shape
    path: str
    times: Times
    floor_bytes: float
    bandwidth: float  # of a copy, bytes per second

    @property
    def rate(self) -> float:
        """Bytes per second: the least traffic over the time of forward and backward."""
        return self.floor_bytes / (self.times.total / 1000)

    @property
    def share(self) -> float:
        """Share of the copy's bandwidth."""
        return self.rate / self.bandwidth

    def __str__(self) -> str:
        return (
            f"{self.operation:<16}{self.path:<22}{self.times.forward:9.3f} ms{self.times.backward:9.3f} ms"
            f" {self.rate / 1e9:7,.0f}{self.share:9.3f} {1 / self.share:9.2f} x"
        )


@dataclass(frozen=True)
class RankRow:
    """The measurement of one operation at the sizes of a model's rank."""

    operation: str
    times: Times
    counted: Counted
    bandwidth: float  # of a copy, bytes per second
    products: float  # of a large matrix product, FLOP/s

    @property
    def floor(self) -> float:
        """Milliseconds."""
        return 1000 * self.counted.seconds(self.bandwidth, self.products)

    @property
    def over_floor(self) -> float:
        return self.times.total / self.floor

    def __str__(self) -> str:
        seconds = self.times.total / 1000
        backward = f"{self.times.backward:9.3f} ms" if self.times.backward else f"{'-':>9}   "
        return (
            f"{self.operation:<22}{self.times.forward:9.3f} ms{backward} {self.counted.bytes / seconds / 1e9:7,.0f}"
            f" {self.counted.flops / seconds / 1e12:8,.1f}{self.floor:9.3f} ms {self.over_floor:9.2f} x"
        )


@dataclass(frozen=True)
class PeerRow:
    """A peer's times for forward and backward beside ours, from the same rounds."""

    peer: str
    shape: Shape
    ours: Times
    theirs: Times

    @property
    def ratio(self) -> float:
        return self.theirs.total / self.ours.total

    def __str__(self) -> str:
        return (
            f"  {self.peer:<42}{self.theirs.forward:10.3f} ms{self.theirs.backward:10.3f} ms"
            f"{self.ratio:8.2f} times our {self.ours.total:.3f} ms"
        )


def summary(rows: Sequence[Row], peer_rows: Sequence[PeerRow], dtype: str) -> list[str]:
    """Return lines that compare the measurements with the goals."""
    lines = [f"\nrglru, forward and backward, {dtype}; the goals are for bfloat16 on an H200"]
    for least, goal in GOALS:
        over = sorted(
            (1 / row.share, str(row.shape)) for row in rows if row.operation == "rglru" and _is_as_wide(row, least)
        )
        title = f"time over the byte floor, B R >= {least}:"
        lines.append(
            f"{title} {over[0][0]:.2f} ({over[0][1]}) to {over[-1][0]:.2f} ({over[-1][1]}); goal: at most {goal:.2f}"
            if over
            else f"{title} not measured; goal: at most {goal:.2f}"
        )
    if peer_rows:
        least_ratio = min(peer_rows, key=lambda row: row.ratio)
        lines.append(
            f"fastest peer, smallest of all shapes: {least_ratio.ratio:.2f} times our time "
            f"({least_ratio.peer}; {least_ratio.shape})"
        )
    else:
        lines.append("fastest peer: not measured")
    return lines


def _is_as_wide(row: Row, least: int) -> bool:
    return row.shape.batch * row.shape.width >= least

"""The rows of the tables of `griffin bench kernels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from griffin.tools.bench.kernels_operations import Shape, Times


@dataclass(frozen=True)
class Row:
    """The measurement of one operation and shape."""

    operation: str
    shape: Shape
    path: str
    times: Times
    floor_bytes: int
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

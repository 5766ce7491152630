"""The axes of the rank grid: coordinates of ranks on them, and the names of ranks in messages.

An axis is added by its name in AXES, at its place in megatron-core's order of ranks, its group in `grid._read`, and its
size in `ParallelConfig`. Coordinates of all ranks, ranks with the same work and replicas' figures follow from that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Ranks are numbered along the first axis first, as in megatron-core.
AXES = ("tensor", "data", "pipeline")
NAMED_HOSTS = 8  # of which a message lists the ranks


@dataclass(frozen=True)
class Axes:
    """The sizes of all axes, in the order of AXES."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, **sizes: int) -> Axes:
        """`Axes.of(tensor=2, data=4)`; axes that are left out have size 1."""
        assert sizes.keys() <= set(AXES), sizes
        return cls(tuple(sizes.get(axis, 1) for axis in AXES))

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    def size(self, axis: str) -> int:
        return self.sizes[AXES.index(axis)]

    def coordinate(self, rank: int, axis: str) -> int:
        place = AXES.index(axis)
        return rank // math.prod(self.sizes[:place]) % self.sizes[place]

    def rank(self, **coordinates: int) -> int:
        """The rank with these coordinates, and 0 on other axes."""
        strides = [math.prod(self.sizes[:place]) for place in range(len(AXES))]
        return sum(coordinates.get(axis, 0) * stride for axis, stride in zip(AXES, strides, strict=True))

    def along(self, axis: str, values: Tensor) -> Tensor:
        """[world] -> [size of the axis, ranks with the same coordinate on it]."""
        place = len(AXES) - 1 - AXES.index(axis)
        return values.view(*reversed(self.sizes)).movedim(place, 0).flatten(1)


def rank_name(rank: int, host: str) -> str:
    return f"rank {rank} on {host}"


def rank_names(ranks: Iterable[int], hosts: Mapping[int, str] | None = None) -> str:
    """ "rank 3 on n0", "ranks 0-7 on n0; ranks 8, 10 on n1": by host, which is left out where it is not known."""
    named: dict[str | None, list[int]] = {}
    for rank in sorted(ranks):
        named.setdefault((hosts or {}).get(rank), []).append(rank)
    texts = []
    for host, mine in list(named.items())[:NAMED_HOSTS]:
        where = "" if host is None else f" on {host}"
        texts.append(f"rank{'s' * (len(mine) > 1)} {_spans(mine)}{where}")
    if len(named) > NAMED_HOSTS:
        rest = sum(len(mine) for mine in list(named.values())[NAMED_HOSTS:])
        texts.append(f"{rest} ranks of {len(named) - NAMED_HOSTS} more hosts")
    return "; ".join(texts)


def _spans(ranks: Iterable[int]) -> str:
    """ "0-7, 9" for sorted numbers."""
    spans = []
    for _, group in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        spans.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 2 else ", ".join(map(str, numbers)))
    return ", ".join(spans)

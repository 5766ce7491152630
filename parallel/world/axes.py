"""Coordinates of ranks on the axes of the rank grid, and names of ranks in messages.

The axes are in `parallel.config.AXES`. To add one, see "Add an axis" in parallel/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from griffin.parallel.config import AXES, ParallelConfig

if TYPE_CHECKING:
    from torch import Tensor

NAMED_HOSTS = 8  # maximum number of hosts in a message


@dataclass(frozen=True)
class Axes:
    """Sizes of all axes, in the order of AXES."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, **sizes: int) -> Axes:
        """Return axes of these sizes, and 1 for axes that are left out: `Axes.of(tensor=2, data=4)`."""
        assert sizes.keys() <= {axis.name for axis in AXES}, sizes
        return cls(tuple(sizes.get(axis.name, 1) for axis in AXES))

    @classmethod
    def of_layout(cls, layout: ParallelConfig, world_size: int) -> Axes:
        """Return the axes of a layout on `world_size` ranks."""
        return cls.of(**layout.model_axes, data=world_size // layout.model_ranks)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def replicas(self) -> int:
        """Number of ranks that hold each weight; megatron-core's data-parallel size with context parallelism."""
        return math.prod(self.size(axis.name) for axis in AXES if not axis.shards_weights)

    def size(self, axis: str) -> int:
        return self.sizes[_place(axis)]

    def coordinate(self, rank: int, axis: str) -> int:
        place = _place(axis)
        return rank // math.prod(self.sizes[:place]) % self.sizes[place]

    def replica(self, rank: int) -> int:
        """Return the index of a rank among those that hold the same weights."""
        number, stride = 0, 1
        for axis in AXES:
            if not axis.shards_weights:
                number += stride * self.coordinate(rank, axis.name)
                stride *= self.size(axis.name)
        return number

    def ranks(self, **coordinates: int) -> list[int]:
        """Return all ranks with these coordinates, in ascending order: `axes.ranks(pipeline=1)`."""
        return [
            rank
            for rank in range(self.world_size)
            if all(self.coordinate(rank, axis) == number for axis, number in coordinates.items())
        ]

    def along(self, axis: str, values: Tensor) -> Tensor:
        """Reshape values [world] to [size of the axis, ranks with the same coordinate on it]."""
        place = len(AXES) - 1 - _place(axis)
        return values.view(*reversed(self.sizes)).movedim(place, 0).flatten(1)


def _place(axis: str) -> int:
    return next(place for place, known in enumerate(AXES) if known.name == axis)


def rank_name(rank: int, host: str) -> str:
    return f"rank {rank} on {host}"


def rank_names(ranks: Iterable[int], hosts: Mapping[int, str] | None = None) -> str:
    """Format ranks by host, as "rank 3 on n0" or "ranks 0-7 on n0; ranks 8, 10 on n1". Unknown hosts are left out."""
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
    """Format sorted numbers as "0-7, 9"."""
    spans = []
    for _, group in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        spans.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 2 else ", ".join(map(str, numbers)))
    return ", ".join(spans)

"""Plan which ranks hold the elements of each chunk of a checkpoint, and which rank writes it.

The distributed optimizer shards its float32 state by flat ranges, whose boundaries fall anywhere in tensors and chunks.
The plan maps every range to its parts of chunks, and picks one owner per chunk. To save, the owner writes the chunk
with the parts that other ranks send. To load, each rank reads the chunks that it holds a part of.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from griffin.trainer.checkpoint.arrays import ArraySpec, Box, GlobalTensor
from griffin.trainer.checkpoint.regions import Region

FILE_COST = 2**18  # elements that take about as long to write as a file takes to create


@dataclass(frozen=True)
class PlacedTensor:
    """The place of a rank's part of a global tensor in a parameter: from `start` on along dimension `dim`."""

    tensor: GlobalTensor
    dim: int
    start: int


@dataclass(frozen=True)
class Parameter:
    """A parameter on each tensor rank: its local shape, and the global tensors fused in it."""

    shape: tuple[int, ...]
    tensors: tuple[PlacedTensor, ...]


@dataclass(frozen=True)
class Shard:
    """Elements [start, stop) of a flattened parameter, which one rank's optimizer updates.

    In the rank's staged state they start at `offset`.
    """

    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Member:
    """A rank, with its shard of each parameter of its pipeline stages."""

    rank: int
    tensor_rank: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Segment:
    """Elements of a chunk that a rank holds: elements [first, last) of two regions of the same size.

    `local` is a region of the rank's flattened parameter number `parameter`, `chunk` one of the flattened chunk.
    """

    rank: int
    parameter: int
    local: Region
    chunk: Region
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class ChunkPlan:
    """A chunk, the same for every array of a tensor: its owner, and which rank holds which elements."""

    tensor: GlobalTensor
    chunks: tuple[int, ...]  # shape of the tensor's chunks
    index: tuple[int, ...]
    size: int  # elements of this chunk
    owner: int
    segments: tuple[Segment, ...]  # by rank

    def involves(self, rank: int) -> bool:
        return self.owner == rank or any(segment.rank == rank for segment in self.segments)


@dataclass(frozen=True)
class ChunkPart:
    """The elements of a chunk that one rank holds in one parameter."""

    tensor: GlobalTensor
    index: tuple[int, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """One rank's part in every save of a run."""

    rank: int
    dtype: str  # of the model's weights
    shards: tuple[Shard, ...]  # this rank's, by parameter
    elements: int  # of each row of the staged state, float32 [master | exp_avg | exp_avg_sq, elements]
    chunks: tuple[ChunkPlan, ...]  # those that involve this rank, in the same order on every rank
    arrays: tuple[ArraySpec, ...]  # of the whole checkpoint, on rank 0; () on the others


def plan_chunks(
    parameters: Sequence[Parameter],
    members: Sequence[Member],
    tensor_size: int,
    chunk_shapes: Mapping[str, tuple[int, ...]],
) -> list[ChunkPlan]:
    """The chunks of all tensors in `parameters`, for saving. Deterministic: every rank gets the same list.

    `chunk_shapes` has each tensor's chunk shape by name. Each element of a chunk is in exactly one segment. Of a tensor
    that is replicated over tensor ranks, one tensor rank's copy is used; they take turns.
    """
    load = {member.rank: 0 for member in members}
    plans = []
    for number, parameter in enumerate(parameters):
        holders = [_holders(members, number, tensor_rank) for tensor_rank in range(tensor_size)]
        for placed in parameter.tensors:
            tensor = placed.tensor
            chunks = chunk_shapes[tensor.name]
            tensor_ranks = [number % tensor_size] if tensor.axis is None else range(tensor_size)
            array = ArraySpec(kind="", tensor=tensor, dtype="float32", chunks=chunks)
            for index in array.indices():
                box = array.box(index)
                size = _elements(box)
                segments = [
                    segment
                    for tensor_rank in tensor_ranks
                    for segment in _segments(
                        parameter, number, placed, box, tensor_rank, tensor_size, holders[tensor_rank]
                    )
                ]
                assert sum(segment.count for segment in segments) == size, (tensor.name, index, segments)
                owner = _owner(segments, size, load)
                segments.sort(key=lambda segment: segment.rank)
                plans.append(
                    ChunkPlan(
                        tensor=tensor, chunks=chunks, index=index, size=size, owner=owner, segments=tuple(segments)
                    )
                )
    assert len({(plan.tensor.name, plan.index) for plan in plans}) == len(plans), "a chunk has two owners"
    return plans


def plan_parts(
    parameter: Parameter,
    number: int,
    member: Member,
    tensor_size: int,
    chunk_shapes: Mapping[str, tuple[int, ...]],
) -> list[ChunkPart]:
    """The parts of chunks that a rank holds in its parameter number `number`, for loading."""
    holders = _holders([member], number, member.tensor_rank)
    parts = []
    for placed in parameter.tensors:
        tensor = placed.tensor
        array = ArraySpec(kind="", tensor=tensor, dtype="float32", chunks=chunk_shapes[tensor.name])
        for index in array.indices():
            segments = _segments(parameter, number, placed, array.box(index), member.tensor_rank, tensor_size, holders)
            if found := tuple(segments):
                parts.append(ChunkPart(tensor, index, found))
    return parts


@dataclass(frozen=True)
class _Holders:
    """The non-empty shards of one parameter on the data-parallel ranks of one tensor rank, ascending."""

    ranks: list[int]
    starts: list[int]
    stops: list[int]


def _holders(members: Sequence[Member], parameter: int, tensor_rank: int) -> _Holders:
    found = sorted(
        (member.shards[parameter].start, member.shards[parameter].stop, member.rank)
        for member in members
        if member.tensor_rank == tensor_rank and member.shards[parameter].stop > member.shards[parameter].start
    )
    return _Holders([rank for _, _, rank in found], [start for start, _, _ in found], [stop for _, stop, _ in found])


def _segments(
    parameter: Parameter,
    number: int,
    placed: PlacedTensor,
    chunk: Box,
    tensor_rank: int,
    tensor_size: int,
    holders: _Holders,
) -> Iterator[Segment]:
    """The segments of a chunk that the data-parallel ranks of one tensor rank hold."""
    part = placed.tensor.part(tensor_rank, tensor_size)
    common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(part, chunk, strict=True)]
    if any(extent.stop <= extent.start for extent in common):
        return
    starts = [extent.start for extent in part]
    starts[placed.dim] -= placed.start
    local = Region.box(parameter.shape, _shifted(common, starts))
    inside = Region.box(
        [extent.stop - extent.start for extent in chunk], _shifted(common, [extent.start for extent in chunk])
    )
    assert local.count == inside.count, (placed, chunk)
    end = local.base + (local.rows - 1) * local.stride + local.length
    for place in range(bisect.bisect_right(holders.stops, local.base), bisect.bisect_left(holders.starts, end)):
        first, last = local.before(holders.starts[place]), local.before(holders.stops[place])
        if first < last:
            yield Segment(holders.ranks[place], number, local, inside, first, last)


def _shifted(box: Sequence[slice], starts: Sequence[int]) -> list[slice]:
    return [slice(extent.start - start, extent.stop - start) for extent, start in zip(box, starts, strict=True)]


def _elements(box: Box) -> int:
    return math.prod(extent.stop - extent.start for extent in box)


def _owner(segments: Sequence[Segment], size: int, load: dict[int, int]) -> int:
    """The rank with elements of the chunk for which writing it costs least; adds the cost to its `load`.

    The cost is the elements that the rank moves: writes so far, this chunk, and what other ranks send of it.
    """
    held: dict[int, int] = {}
    for segment in segments:
        held[segment.rank] = held.get(segment.rank, 0) + segment.count
    owner = min(held, key=lambda rank: (load[rank] + size - held[rank], rank))
    load[owner] += FILE_COST + 2 * size - held[owner]
    return owner

"""The plan for saving and loading against brute force: state is sharded by flat ranges and assembled from segments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from griffin.trainer.checkpoint import arrays
from griffin.trainer.checkpoint.arrays import ArraySpec, GlobalTensor, chunk_shape, default_cuts
from griffin.trainer.checkpoint.plan import Member, Parameter, PlacedTensor, Shard, plan_chunks, plan_parts
from griffin.trainer.checkpoint.regions import Region, move, put, take


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[slice]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    box = []
    for dim, size in enumerate(shape):
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start + 1, size))
        whole = 0 < dim < len(shape) - 1
        box.append(slice(0, size) if whole else slice(start, stop))
    return shape, box


@given(case=boxes(), data=st.data())
def test_a_region_has_the_elements_of_its_box_in_order(
    case: tuple[list[int], list[slice]], data: st.DataObject
) -> None:
    shape, box = case
    flat = np.arange(math.prod(shape), dtype=np.float32)
    expected = flat.reshape(shape)[tuple(box)].ravel()
    region = Region.box(shape, box)
    assert region.count == expected.size
    first = data.draw(st.integers(0, region.count))
    last = data.draw(st.integers(first, region.count))
    np.testing.assert_array_equal(take(flat, region, first, last), expected[first:last])
    written = np.full_like(flat, -1)
    put(written, region, first, last, expected[first:last])
    np.testing.assert_array_equal(written, np.where(np.isin(flat, expected[first:last]), flat, -1))
    for address in range(flat.size + 2):
        assert region.before(address) == (expected < address).sum()


@given(case=boxes(), data=st.data())
def test_take_and_put_in_a_shard(case: tuple[list[int], list[slice]], data: st.DataObject) -> None:
    shape, box = case
    flat = np.arange(math.prod(shape), dtype=np.float32)
    region = Region.box(shape, box)
    start = data.draw(st.integers(0, flat.size - 1))
    stop = data.draw(st.integers(start + 1, flat.size))
    first, last = region.before(start), region.before(stop)
    held = take(flat[start:stop], region, first, last, origin=start)
    expected = [value for value in flat.reshape(shape)[tuple(box)].ravel() if start <= value < stop]
    np.testing.assert_array_equal(held, expected)
    out = np.full(stop - start, -1, np.float32)
    put(out, region, first, last, held, origin=start)
    assert set(out[out >= 0]) == set(expected)


def fused_parameters(tensor_size: int) -> list[Parameter]:
    """Parameters that hold global tensors in every way: fused rows, fused columns, replicated, padded, plain."""
    up, gate = (GlobalTensor(name=name, shape=(24, 5), axis=0, atoms=24) for name in ("gate", "up"))
    down = GlobalTensor(name="down", shape=(5, 24), axis=1, atoms=24)
    a, r = (GlobalTensor(name=name, shape=(12, 3, 3), axis=0, atoms=12) for name in ("input", "recurrence"))
    vocabulary = GlobalTensor(name="embedding", shape=(31, 5), axis=0, atoms=36, padded=36)
    norm = GlobalTensor(name="norm", shape=(7,))
    held = 24 // tensor_size
    return [
        Parameter((36 // tensor_size, 5), (PlacedTensor(vocabulary, 0, 0),)),
        Parameter((7,), (PlacedTensor(norm, 0, 0),)),
        Parameter((2 * held, 5), (PlacedTensor(up, 0, 0), PlacedTensor(gate, 0, held))),
        Parameter((5, held), (PlacedTensor(down, 0, 0),)),
        Parameter((12 // tensor_size, 3, 6), (PlacedTensor(a, 2, 0), PlacedTensor(r, 2, 3))),
    ]


@settings(max_examples=40)
@given(
    tensor_size=st.sampled_from([1, 2, 3, 4, 6]),
    data_size=st.integers(1, 4),
    whole=st.sampled_from([0, 10**9]),
    rows=st.integers(1, 4),
    data=st.data(),
)
def test_every_chunk_element_comes_from_the_rank_that_holds_it(
    tensor_size: int, data_size: int, whole: int, rows: int, data: st.DataObject
) -> None:
    parameters = fused_parameters(tensor_size)
    tensors = [placed.tensor for parameter in parameters for placed in parameter.tensors]
    # Each value encodes its tensor and its place in it.
    values = {
        tensor.name: (1000 * number + np.arange(tensor.elements, dtype=np.float32)).reshape(tensor.shape)
        for number, tensor in enumerate(tensors)
    }
    members, flats = [], {}
    cuts_of = [
        sorted(data.draw(st.integers(0, math.prod(parameter.shape))) for _ in range(data_size - 1))
        for parameter in parameters
    ]
    for rank in range(tensor_size * data_size):
        data_rank, tensor_rank = divmod(rank, tensor_size)
        shards, held, offset = [], [], 0
        for parameter, cuts in zip(parameters, cuts_of, strict=True):
            local = np.full(parameter.shape, -1, np.float32)
            for placed in parameter.tensors:
                part = values[placed.tensor.name][placed.tensor.part(tensor_rank, tensor_size)]
                place = [slice(0, size) for size in part.shape]
                place[placed.dim] = slice(placed.start, placed.start + part.shape[placed.dim])
                local[tuple(place)] = part
            ends = [0, *cuts, local.size]
            start, stop = ends[data_rank], ends[data_rank + 1]
            shards.append(Shard(start, stop, offset))
            held.append(local.ravel()[start:stop])
            offset += stop - start
        members.append(Member(rank, tensor_rank, tuple(shards)))
        flats[rank] = np.concatenate(held)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "WHOLE_BYTES", whole)
        patch.setattr(arrays, "CHUNK_BYTES", rows * 20)
        shapes = {tensor.name: chunk_shape(tensor, default_cuts(tensors)) for tensor in tensors}
    plans = plan_chunks(parameters, members, tensor_size, shapes)
    grids = {
        tensor.name: ArraySpec(kind="model", tensor=tensor, dtype="float32", chunks=shapes[tensor.name])
        for tensor in tensors
    }
    assert {(plan.tensor.name, plan.index) for plan in plans} == {
        (name, index) for name, grid in grids.items() for index in grid.indices()
    }
    for plan in plans:
        box = grids[plan.tensor.name].box(plan.index)
        expected = values[plan.tensor.name][box]
        chunk = np.full(plan.size, -1, np.float32)
        assert plan.owner in {segment.rank for segment in plan.segments}
        for segment in plan.segments:
            shard = members[segment.rank].shards[segment.parameter]
            flat = flats[segment.rank][shard.offset : shard.offset + shard.stop - shard.start]
            values_held = take(flat, segment.local, segment.first, segment.last, origin=shard.start)
            assert (take(chunk, segment.chunk, segment.first, segment.last) == -1).all(), "two sources"
            put(chunk, segment.chunk, segment.first, segment.last, values_held)
        np.testing.assert_array_equal(chunk.reshape(expected.shape), expected)

    # Loading fills all that a rank holds except padding, which is -1 here.
    for member in members:
        received = np.full_like(flats[member.rank], -1)
        for number, (parameter, shard) in enumerate(zip(parameters, member.shards, strict=True)):
            out = received[shard.offset : shard.offset + shard.stop - shard.start]
            for piece in plan_parts(parameter, number, member, tensor_size, shapes):
                read = values[piece.tensor.name][grids[piece.tensor.name].box(piece.index)].ravel()
                assert piece.segments
                for segment in piece.segments:
                    move(read, segment.chunk, out, segment.local, segment.first, segment.last, shard.start)
        np.testing.assert_array_equal(received, flats[member.rank])


def test_owners_balance_the_work() -> None:
    """8 data-parallel ranks with equal shards write equally much, up to one chunk."""
    tensor = GlobalTensor(name="w", shape=(4096, 4096), axis=0, atoms=16)
    parameters = [Parameter(tensor.shape, (PlacedTensor(tensor, 0, 0),))]
    size = tensor.elements // 8
    members = [Member(rank, 0, (Shard(rank * size, (rank + 1) * size, 0),)) for rank in range(8)]
    plans = plan_chunks(parameters, members, 1, {"w": (256, 4096)})
    written = [sum(plan.size for plan in plans if plan.owner == rank) for rank in range(8)]
    assert max(written) - min(written) <= plans[0].size


def test_chunks_are_unions_of_atoms_within_bounds() -> None:
    up = GlobalTensor(name="up", shape=(15360, 5120), axis=0, atoms=960)
    out = GlobalTensor(name="out", shape=(5120, 5120), axis=1, atoms=16)
    embedding = GlobalTensor(name="embedding", shape=(256_000, 5120), axis=0, atoms=320)
    norm = GlobalTensor(name="norm", shape=(5120,))
    tensors = [up, out, embedding, norm]
    cuts = default_cuts(tensors)
    assert cuts == 8  # the tensor sizes 1, 2, 4 and 8 divide all of 960, 16 and 320
    assert chunk_shape(up, cuts) == (1920, 5120)
    assert chunk_shape(out, cuts) == (5120, 640)
    assert chunk_shape(embedding, cuts) == (3200, 5120)  # a tenth of an eighth: 62.5 MiB
    assert chunk_shape(norm, cuts) == (5120,)
    ten = [GlobalTensor(name="a", shape=(2560, 2560), axis=0, atoms=10), up]
    assert default_cuts(ten) == 10  # sizes 1, 2, 5: tenths serve all of them

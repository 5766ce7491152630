"""Plan what saving a training's checkpoint would write, stage and exchange, without running it.

The stages of every pipeline rank are built from meta tensors in a world without other ranks, and cut into shards by
megatron-core's own code. The plan is the same that the ranks would make.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from griffin.parallel.world.axes import Axes
from griffin.trainer.checkpoint.arrays import (
    KINDS,
    MODEL,
    ArraySpec,
    GlobalTensor,
    chunk_shape,
    default_cuts,
    numpy_dtype,
    state_arrays,
)
from griffin.trainer.checkpoint.plan import ChunkPlan, Member, Parameter, Shard, plan_chunks
from griffin.trainer.settings.sections import Config
from griffin.trainer.settings.validate import validate

if TYPE_CHECKING:
    from griffin.parallel.world.grid import Grid

FLOAT32_BYTES = 4
SIZE_CLASSES = (2**16, 2**20, 2**22, 2**24, 2**25, 2**26)  # upper bounds of the bytes of values in a file


def print_plan(config: Config, world_size: int) -> None:
    """Plan the checkpoint of a training on `world_size` ranks, and print the figures. Raises ValueError."""
    begun = time.perf_counter()
    validate(config, world_size)
    print(describe(config, world_size, plan_checkpoint(config, world_size)))
    print(f"planned in {time.perf_counter() - begun:.1f} s")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The ranks that hold the same pipeline stages, and the chunks that they save together."""

    members: tuple[Member, ...]  # by rank
    chunks: tuple[ChunkPlan, ...]


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """All arrays of a checkpoint, and the chunks that each pipeline rank's stages save."""

    arrays: tuple[ArraySpec, ...]
    stages: tuple[StagePlan, ...]  # by pipeline rank


@dataclass(kw_only=True)
class RankLoad:
    """What one rank does for one checkpoint: bytes, and a number of files."""

    staged: int  # its state, copied to the memory shared with its saving process
    files: int = 0
    written: int = 0
    received: int = 0
    sent: int = 0
    largest: int = 0  # largest float32 chunk that it writes or holds a part of

    @property
    def peak(self) -> int:
        """Peak memory of its saving process, without Python and libraries: the staged state and chunks."""
        from griffin.trainer.checkpoint.saving.share import WRITERS

        # Chunks being written; one being assembled, and what was received of it; and one being sent.
        return self.staged + (WRITERS + 3) * self.largest


def plan_checkpoint(config: Config, world_size: int) -> CheckpointPlan:
    """Make the plan of `world_size` ranks that train `config`, which must be valid for that many.

    With `train.overlap` "auto", ranks are assumed to have GPUs. Communication then overlaps with computation, which
    determines the size of megatron-core's buckets and so the shards.
    """
    from griffin.parallel.world.grid import fake_grid
    from griffin.trainer.checkpoint.state import in_model_order

    parallel = config.parallel
    axes = Axes.of_layout(parallel, world_size)
    stages: list[tuple[list[Parameter], list[Member]]] = []
    placed_in: list[tuple[tuple[int, int], GlobalTensor]] = []
    for pipeline_rank in range(parallel.pipeline):
        ranks = axes.ranks(pipeline=pipeline_rank)
        with fake_grid(config.parallel, world_size, ranks[0]) as grid:
            numbers, layouts, shards = _shards(config, grid)
        # Tensor ranks hold parameters of equal shapes, so their shards are equal.
        members = [Member(rank, axes.coordinate(rank, "tensor"), shards[axes.replica(rank)]) for rank in ranks]
        stages.append((layouts, members))
        placed_in += [
            ((number, pipeline_rank), placed.tensor)
            for number, layout in zip(numbers, layouts, strict=True)
            for placed in layout.tensors
        ]
    tensors = in_model_order(placed_in)
    cuts = default_cuts(tensors)
    shapes = {tensor.name: chunk_shape(tensor, cuts) for tensor in tensors}
    return CheckpointPlan(
        arrays=tuple(state_arrays(tensors, config.train.dtype, cuts)),
        stages=tuple(
            StagePlan(
                members=tuple(members),
                chunks=tuple(plan_chunks(layouts, members, axes.size("tensor"), shapes)),
            )
            for layouts, members in stages
        ),
    )


def _shards(config: Config, grid: Grid) -> tuple[list[int], list[Parameter], list[tuple[Shard, ...]]]:
    """Return, for the parameters that this rank's stages save, their stages and layouts, and all replicas' shards."""
    import torch

    from griffin.parallel import megatron_device
    from griffin.parallel.stage import build_stages
    from griffin.trainer.checkpoint.state import parameter_layout, shards_in_a_row
    from griffin.trainer.sharded_optimizer import overlaps_communication, shard_ranges, wrap_in_ddp

    with megatron_device.on_meta():
        stages = build_stages(
            config.model,
            config.parallel,
            grid,
            dtype=getattr(torch, config.train.dtype),
            sequence=config.data.sequence_length,
        )
        chunks = wrap_in_ddp(stages, overlaps_communication(config, grid.axes.replicas, on_gpu=True))
    saved = [
        (number, parameter)
        for number, stage in enumerate(stages)
        for parameter in stage.parameters()
        if not getattr(parameter, "shared", False)  # the second copy of the tied embedding
    ]
    shards = []
    for replica in range(grid.axes.replicas):
        ranges = shard_ranges(chunks, replica, grid.axes.replicas)
        shards.append(shards_in_a_row(ranges.get(parameter, (0, 0)) for _, parameter in saved))
    return [number for number, _ in saved], [parameter_layout(parameter) for _, parameter in saved], shards


def file_bytes(array: ArraySpec) -> int:
    """Return the size of each file of an array; chunks at its edge are padded with zeros."""
    from griffin.trainer.checkpoint.zarr_io import CRC_BYTES

    return math.prod(array.chunks) * numpy_dtype(array.dtype).itemsize + CRC_BYTES


def rank_loads(plan: CheckpointPlan) -> list[list[RankLoad]]:
    """Return what every rank does, by pipeline rank, then by rank."""
    from griffin.trainer.checkpoint.saving.protocol import ROWS

    sizes: dict[str, list[int]] = {}  # by tensor: sizes of the files that one of its chunks is written to
    for array in plan.arrays:
        sizes.setdefault(array.tensor.name, []).append(file_bytes(array))
    loads = {
        member.rank: RankLoad(staged=ROWS * FLOAT32_BYTES * sum(shard.stop - shard.start for shard in member.shards))
        for stage in plan.stages
        for member in stage.members
    }
    for chunk in (chunk for stage in plan.stages for chunk in stage.chunks):
        owner, files = loads[chunk.owner], sizes[chunk.tensor.name]
        owner.files += len(files)
        owner.written += sum(files)
        for segment in chunk.segments:
            load, moved = loads[segment.rank], ROWS * FLOAT32_BYTES * segment.count
            load.largest = max(load.largest, FLOAT32_BYTES * chunk.size)
            if segment.rank != chunk.owner:
                load.sent += moved
                owner.received += moved
    return [[loads[member.rank] for member in stage.members] for stage in plan.stages]


def cut_tensors(arrays: Sequence[ArraySpec], tensor_size: int) -> list[str]:
    """Return the names of tensors of several chunks some of which are split between tensor ranks."""
    names = []
    for array in arrays:
        axis = array.tensor.axis
        if array.kind != MODEL or axis is None or math.prod(array.grid) == 1:
            continue
        chunk, size = array.chunks[axis], array.shape[axis]
        parts = (array.tensor.part(tensor_rank, tensor_size)[axis] for tensor_rank in range(tensor_size))
        if any(edge % chunk and edge != size for part in parts for edge in (part.start, part.stop)):
            names.append(array.tensor.name)
    return names


def describe(config: Config, world_size: int, plan: CheckpointPlan) -> str:
    """Format the figures of a plan."""
    from griffin.trainer.sharded_optimizer import overlaps_communication

    parallel = config.parallel
    axes = Axes.of_layout(parallel, world_size)
    weights = sum(array.tensor.elements for array in plan.arrays if array.kind == MODEL)
    overlap = "with" if overlaps_communication(config, axes.replicas, on_gpu=True) else "without"
    assumed = " (train.overlap = 'auto': on GPUs)" if config.train.overlap == "auto" and overlap == "with" else ""
    sizes = " x ".join(f"{axis} {size}" for axis, size in parallel.model_axes.items())
    virtual = f" ({parallel.virtual_pipeline} stages each)" if parallel.virtual_pipeline > 1 else ""
    cut = cut_tensors(plan.arrays, parallel.tensor)
    reads = "a tensor rank reads whole chunks only, except of sharded tensors that are one chunk"
    if cut:
        names = f"{', '.join(cut[:8])}{', ...' if len(cut) > 8 else ''}"
        reads = f"tensor ranks read parts of the chunks of {len(cut)} tensors: {names}"
    return "\n".join(
        [
            f"{world_size} ranks: {sizes}{virtual} x data {axes.size('data')}",
            f"{weights:,} weights, {config.train.dtype}; sharded for training {overlap} overlap{assumed}",
            "",
            *_file_lines(plan.arrays),
            "",
            *_rank_lines(plan),
            "",
            f"tensor-parallel size {parallel.tensor}: {reads}",
        ]
    )


def _file_lines(arrays: Sequence[ArraySpec]) -> Iterator[str]:
    from griffin.trainer.checkpoint.zarr_io import CRC_BYTES

    columns = ("total", "smallest", "median", "mean", "largest")
    yield f"{'':<21} {'arrays':>6} {'files':>7} {'bytes':>19} " + " ".join(f"{column:>9}" for column in columns)
    sizes: list[int] = []
    for kind in (*KINDS, "all"):
        chosen = [array for array in arrays if kind in (array.kind, "all")]
        if not chosen:  # a float32 training has no master weights
            continue
        sizes = [file_bytes(array) for array in chosen for _ in array.indices()]
        figures = (sum(sizes), min(sizes), statistics.median(sizes), statistics.mean(sizes), max(sizes))
        yield f"{kind:<21} {len(chosen):>6,} {len(sizes):>7,} {sum(sizes):>19,} " + " ".join(
            f"{_short(figure):>9}" for figure in figures
        )
    counts = []
    for above, bound in itertools.pairwise((0, *SIZE_CLASSES, math.inf)):
        if count := sum(above < size - CRC_BYTES <= bound for size in sizes):
            counts.append(f"{count:,} {f'up to {_short(bound)}' if bound < math.inf else 'larger'}")
    yield f"sizes: {', '.join(counts)}"
    yield f"and {len(arrays) + 2:,} metadata files: zarr.json of each array and of the group, and manifest.json"


def _rank_lines(plan: CheckpointPlan) -> Iterator[str]:
    loads = rank_loads(plan)
    everyone = [load for stage in loads for load in stage]
    yield f"{'each rank':<30} {'least':>9} {'mean':>9} {'most':>9} {'most / mean':>12}"
    yield _row("staged in memory", [load.staged for load in everyone], _short)
    yield _row("written", [load.written for load in everyone], _short)
    yield _row("files written", [load.files for load in everyone], lambda count: f"{count:,.0f}")
    yield _row("received from other ranks", [load.received for load in everyone], _short)
    yield _row("sent to other ranks", [load.sent for load in everyone], _short)
    yield _row("memory of its saving process", [load.peak for load in everyone], _short)
    if len(loads) > 1:  # a rank writes what its own stages hold
        ratios = [balance([load.written for load in stage]) for stage in loads]
        yield f"written, most / mean of each pipeline rank: {', '.join(f'{ratio:.2f}' for ratio in ratios)}"


def balance(values: Sequence[int]) -> float:
    """Return the largest over the mean; 1 if all are 0."""
    return max(values) / statistics.mean(values) if any(values) else 1.0


def _row(name: str, values: Sequence[int], text: Callable[[float], str]) -> str:
    figures = (min(values), statistics.mean(values), max(values))
    return f"{name:<30} {' '.join(f'{text(figure):>9}' for figure in figures)} {balance(values):>12.2f}"


def _short(size: float) -> str:
    """Format bytes with three to four digits and a binary unit."""
    unit = next((unit for unit in range(4) if size < 1000 * 1024**unit), 4)
    number = size / 1024**unit
    return f"{number:.{0 if unit == 0 or number >= 100 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"

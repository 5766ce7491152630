"""A rank's part of a training's state: the flat float32 shards that its optimizer updates, out of and into place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from griffin.parallel.grid import Grid
from griffin.parallel.sharding import Piece
from griffin.trainer.checkpoint.arrays import (
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    MODEL,
    GlobalTensor,
    chunk_shape,
    default_cuts,
    state_arrays,
)
from griffin.trainer.checkpoint.manifest import Manifest
from griffin.trainer.checkpoint.plan import (
    ChunkPlan,
    Member,
    Parameter,
    PlacedTensor,
    SavePlan,
    Segment,
    Shard,
    plan_chunks,
)
from griffin.trainer.checkpoint.regions import put, take
from griffin.trainer.checkpoint.zarr_io import Array, open_array
from griffin.trainer.step import Training

ROUND_ELEMENTS = 64 * 2**20  # a rank reads and hands on this many at a time when it loads
READERS = 4  # chunks that a rank reads at a time


class ShardedState:
    """What one rank holds of master weights and Adam moments, and how it is saved and loaded. Made by all ranks."""

    def __init__(self, training: Training, grid: Grid):
        self._training, self._grid = training, grid
        self._parameters = [parameter for stage in training.stages for parameter in stage.parameters()]
        # A second copy of the tied embedding is loaded, but saved by the stage that owns the first.
        self._is_owned = [not getattr(parameter, "shared", False) for parameter in self._parameters]
        self._layouts = [parameter_layout(parameter) for parameter in self._parameters]
        ranges = [training.shard_range(parameter) for parameter in self._parameters]
        virtual = [number for number, stage in enumerate(training.stages) for _ in stage.parameters()]
        owned = [
            ((number, grid.pipeline_rank), placed.tensor)
            for number, layout, is_owned in zip(virtual, self._layouts, self._is_owned, strict=True)
            for placed in layout.tensors
            if is_owned and grid.data_rank == 0 and grid.tensor_rank == 0
        ]
        everyone = grid.all_gather((grid.pipeline_rank, grid.tensor_rank, ranges, owned))
        self._stage_ranks = [
            (rank, tensor_rank, ranges)
            for rank, (pipeline_rank, tensor_rank, ranges, _) in enumerate(everyone)
            if pipeline_rank == grid.pipeline_rank
        ]
        # In the model's order, whichever stages hold them: the same checkpoint from any layout.
        found = sorted(itertools.chain.from_iterable(owned for *_, owned in everyone), key=itemgetter(0))
        self.tensors: list[GlobalTensor] = [tensor for _, tensor in found]
        assert len({tensor.name for tensor in self.tensors}) == len(self.tensors), "two stages own one tensor"

    def save_plan(self) -> SavePlan:
        """This rank's part in saving: the chunks it writes and those it has a part of."""
        cuts = default_cuts(self.tensors)
        dtype = str(self._training.dtype).removeprefix("torch.")
        layouts = [layout for layout, owned in zip(self._layouts, self._is_owned, strict=True) if owned]
        members = self._members(self._is_owned)
        shapes = {tensor.name: chunk_shape(tensor, cuts) for tensor in self.tensors}
        chunks = plan_chunks(layouts, members, self._grid.tensor_size, shapes, replicas=False)
        shards = self._shards(members)
        return SavePlan(
            rank=self._grid.rank,
            dtype=dtype,
            shards=shards,
            elements=_elements(shards),
            chunks=tuple(chunk for chunk in chunks if chunk.involves(self._grid.rank)),
            arrays=tuple(state_arrays(self.tensors, dtype, cuts)) if self._grid.is_first_rank else (),
        )

    @torch.no_grad()
    def stage(self, out: Tensor) -> None:
        """Copy this rank's state to `out`: float32 [3 (master, exp_avg, exp_avg_sq), elements], on the CPU."""
        offset = 0
        for parameter, is_owned in zip(self._parameters, self._is_owned, strict=True):
            if not is_owned:
                continue
            values = self._training.shard_state(parameter)
            if values is None:
                continue
            master, exp_avg, exp_avg_sq = values
            size = master.numel()
            for row, value in zip(out[:, offset : offset + size], (master, exp_avg, exp_avg_sq), strict=True):
                if value is None:  # Adam makes its moments at the first step
                    row.zero_()
                else:
                    row.copy_(value, non_blocking=True)
            offset += size
        assert offset == out.shape[1], (offset, out.shape)
        if self._grid.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def load(self, folder: Path, manifest: Manifest, *, everything: bool) -> None:
        """Fill in the weights, and with `everything` Adam's state, from a checkpoint of any layout. A collective.

        Every chunk is read once, by one rank, which hands its elements to the ranks that hold them; the weights then
        reach all data-parallel ranks as they do after an optimizer step. Raises ValueError where the checkpoint is of
        another model, before anything is changed, and CheckpointError naming the file where a chunk is damaged.
        """
        kinds = [MASTER if f"{MASTER}.{self.tensors[0].name}" in manifest.arrays else MODEL]
        kinds += [EXP_AVG, EXP_AVG_SQ] if everything else []
        self._refuse_other_tensors(manifest, kinds)
        members = self._members([True] * len(self._parameters))
        shards = self._shards(members)
        # Not np.zeros, whose memory comes in small pages: filling those takes longer than reading the files.
        state = np.empty((len(kinds), _elements(shards)), np.float32)
        chunks, planned = list[ChunkPlan](), dict[str, tuple[int, ...]]()
        for row, kind in zip(state, kinds, strict=True):
            arrays = {tensor.name: manifest.arrays[f"{kind}.{tensor.name}"] for tensor in self.tensors}
            shapes = {name: array.chunks for name, array in arrays.items()}
            if shapes != planned:  # mostly, they are the same for all kinds
                chunks = plan_chunks(self._layouts, members, self._grid.tensor_size, shapes, replicas=True)
                planned = shapes
            if _held(chunks, self._grid.rank) < row.size:
                row[:] = 0  # the vocabulary's padding is in no chunk
            opened = {
                chunk.tensor.name: open_array(folder, arrays[chunk.tensor.name])
                for chunk in chunks
                if chunk.owner == self._grid.rank
            }
            for some in _rounds(chunks):
                self._read_and_exchange(some, opened, manifest, shards, row)
        self._fill(torch.from_numpy(state), shards, manifest.step if everything else None)

    def _members(self, chosen: Sequence[bool]) -> list[Member]:
        """The ranks of this rank's stages with their shards of the chosen parameters."""
        return [
            Member(rank, tensor_rank, shards_in_a_row(itertools.compress(ranges, chosen)))
            for rank, tensor_rank, ranges in self._stage_ranks
        ]

    def _shards(self, members: Sequence[Member]) -> tuple[Shard, ...]:
        return next(member.shards for member in members if member.rank == self._grid.rank)

    def _refuse_other_tensors(self, manifest: Manifest, kinds: Sequence[str]) -> None:
        differences = []
        for kind in kinds:
            prefix = f"{kind}."
            shapes = {
                name.removeprefix(prefix): array.shape
                for name, array in manifest.arrays.items()
                if name.startswith(prefix)
            }
            mine = {tensor.name: tensor.shape for tensor in self.tensors}
            for name in sorted(shapes.keys() | mine.keys()):
                if shapes.get(name) != mine.get(name):
                    there, here = shapes.get(name, "missing"), mine.get(name, "missing")
                    differences.append(f"{prefix}{name} is {there} there, {here} here")
        if differences:
            shown = "; ".join(differences[:20])
            more = f"; and {len(differences) - 20} more" if len(differences) > 20 else ""
            raise ValueError(f"the checkpoint of step {manifest.step} is of another model: {shown}{more}")

    def _read_and_exchange(
        self,
        chunks: Sequence[ChunkPlan],
        arrays: Mapping[str, Array],
        manifest: Manifest,
        shards: Sequence[Shard],
        out: np.ndarray,
    ) -> None:
        """Read this rank's own of some chunks, and bring all ranks' elements of them to their places in `out`."""
        me, ranks = self._grid.rank, [rank for rank, _, _ in self._stage_ranks]
        sent, incoming = dict.fromkeys(ranks, 0), {rank: list[Segment]() for rank in ranks}
        for chunk in chunks:
            for segment in chunk.segments:
                if chunk.owner == me != segment.rank:
                    sent[segment.rank] += segment.count
                elif segment.rank == me != chunk.owner:
                    incoming[chunk.owner].append(segment)
        sending = np.empty(sum(sent.values()), np.float32)
        starts = dict(zip(ranks, itertools.accumulate(sent.values(), initial=0), strict=False))

        def sent_from(segment: Segment) -> np.ndarray | None:
            if segment.rank == me:
                return None
            start = starts[segment.rank]
            starts[segment.rank] += segment.count
            return sending[start : start + segment.count]

        def keep(segment: Segment, values: np.ndarray) -> None:
            shard = shards[segment.parameter]
            held = out[shard.offset : shard.offset + shard.stop - shard.start]
            put(held, segment.local, segment.first, segment.last, values, origin=shard.start)

        def read(task: tuple[ChunkPlan, list[np.ndarray | None]]) -> None:
            chunk, places = task
            array = arrays[chunk.tensor.name]
            values = array.read_chunk(chunk.index, manifest.files[array.spec.file(chunk.index)])
            values = values.astype(np.float32, copy=False).reshape(-1)
            for segment, place in zip(chunk.segments, places, strict=True):
                part = take(values, segment.chunk, segment.first, segment.last)
                if place is None:
                    keep(segment, part)
                else:
                    place[:] = part

        owned = [(chunk, [sent_from(segment) for segment in chunk.segments]) for chunk in chunks if chunk.owner == me]
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, owned))
        received = self._all_to_all(
            sending, list(sent.values()), [sum(segment.count for segment in incoming[rank]) for rank in ranks]
        )
        at = 0
        for segment in itertools.chain.from_iterable(incoming.values()):
            keep(segment, received[at : at + segment.count])
            at += segment.count

    def _all_to_all(self, values: np.ndarray, sent: list[int], received: list[int]) -> np.ndarray:
        if len(sent) == 1:
            return values
        device = self._grid.device
        output = torch.from_numpy(np.empty(sum(received), np.float32)).to(device)
        dist.all_to_all_single(
            output, torch.from_numpy(values).to(device), received, sent, group=self._grid.stage_group
        )
        return output.cpu().numpy()

    @torch.no_grad()
    def _fill(self, state: Tensor, shards: Sequence[Shard], step: int | None) -> None:
        """Put loaded rows [master (, exp_avg, exp_avg_sq)] into the optimizer and the weights into the model."""
        for parameter, shard in zip(self._parameters, shards, strict=True):
            rows = state[:, shard.offset : shard.offset + shard.stop - shard.start]
            if rows.shape[1] > 0:
                self._training.set_shard_state(parameter, rows[0], rows[1:] if step is not None else None)
        self._training.spread_weights()
        if step is not None:
            self._training.continue_after(step)


def parameter_layout(parameter: nn.Parameter) -> Parameter:
    """How the global tensors of a parameter lie in it."""
    return Parameter(tuple(parameter.shape), tuple(_placed(piece) for piece in parameter.pieces))  # type: ignore[attr-defined]


def shards_in_a_row(ranges: Iterable[tuple[int, int]]) -> tuple[Shard, ...]:
    """Shards of consecutive parameters, staged one after the other."""
    shards, offset = [], 0
    for start, stop in ranges:
        shards.append(Shard(start, stop, offset))
        offset += stop - start
    return tuple(shards)


def _placed(piece: Piece) -> PlacedTensor:
    tensor = GlobalTensor(name=piece.name, shape=piece.shape, axis=piece.axis, atoms=piece.atoms, padded=piece.padded)
    return PlacedTensor(tensor, piece.dim, piece.start)


def _held(chunks: Iterable[ChunkPlan], rank: int) -> int:
    return sum(segment.count for chunk in chunks for segment in chunk.segments if segment.rank == rank)


def _elements(shards: Sequence[Shard]) -> int:
    return sum(shard.stop - shard.start for shard in shards)


def _rounds(chunks: Sequence[ChunkPlan]) -> Iterator[list[ChunkPlan]]:
    """Consecutive chunks, of which no rank owns more than ROUND_ELEMENTS together (or one chunk)."""
    some: list[ChunkPlan] = []
    load: dict[int, int] = {}
    for chunk in chunks:
        if some and load.get(chunk.owner, 0) + chunk.size > ROUND_ELEMENTS:
            yield some
            some, load = [], {}
        some.append(chunk)
        load[chunk.owner] = load.get(chunk.owner, 0) + chunk.size
    if some:
        yield some

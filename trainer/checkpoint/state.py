"""A rank's part of a training's state: the flat float32 shards that its optimizer updates, out of and into place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from griffin.trainer.checkpoint.plan import ChunkPlan, Member, Parameter, PlacedTensor, SavePlan, Shard, plan_chunks
from griffin.trainer.checkpoint.regions import put, take
from griffin.trainer.checkpoint.zarr_io import Array, CheckpointError, open_array
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
        owned = [
            placed.tensor
            for layout, is_owned in zip(self._layouts, self._is_owned, strict=True)
            for placed in layout.tensors
            if is_owned and grid.data_rank == 0 and grid.tensor_rank == 0
        ]
        everyone = grid.all_gather((grid.pipeline_rank, grid.tensor_rank, ranges, owned))
        self._stage_ranks = [
            (rank, tensor_rank, ranges)
            for rank, (pipeline_rank, tensor_rank, ranges, _) in enumerate(everyone)
            if pipeline_rank == grid.pipeline_rank
        ]
        self.tensors: list[GlobalTensor] = [tensor for _, _, _, tensors in everyone for tensor in tensors]
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
        state = np.zeros((len(kinds), _elements(shards)), np.float32)
        for row, kind in zip(state, kinds, strict=True):
            arrays = {tensor.name: manifest.arrays[f"{kind}.{tensor.name}"] for tensor in self.tensors}
            shapes = {name: array.chunks for name, array in arrays.items()}
            chunks = plan_chunks(self._layouts, members, self._grid.tensor_size, shapes, replicas=True)
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

        def read(chunk: ChunkPlan) -> np.ndarray:
            array = arrays[chunk.tensor.name]
            file = array.spec.file(chunk.index)
            if array.record(chunk.index) != manifest.files[file]:
                raise CheckpointError(f"{array.folder / file}: is not the chunk that was saved")
            return array.read(array.spec.box(chunk.index)).astype(np.float32, copy=False).ravel()

        owned = [chunk for chunk in chunks if chunk.owner == me]
        with ThreadPoolExecutor(READERS) as pool:
            values = list(pool.map(read, owned))
        outgoing: dict[int, list[np.ndarray]] = {rank: [] for rank in ranks}
        for chunk, value in zip(owned, values, strict=True):
            for segment in chunk.segments:
                outgoing[segment.rank].append(take(value, segment.chunk, segment.first, segment.last))
        incoming = {
            rank: [
                segment for chunk in chunks if chunk.owner == rank for segment in chunk.segments if segment.rank == me
            ]
            for rank in ranks
        }
        received = self._all_to_all(
            np.concatenate([np.empty(0, np.float32), *(part for rank in ranks for part in outgoing[rank])]),
            [sum(part.size for part in outgoing[rank]) for rank in ranks],
            [sum(segment.count for segment in incoming[rank]) for rank in ranks],
        )
        at = 0
        for rank in ranks:
            for segment in incoming[rank]:
                shard = shards[segment.parameter]
                place = out[shard.offset : shard.offset + shard.stop - shard.start]
                part = received[at : at + segment.count]
                put(place, segment.local, segment.first, segment.last, part, origin=shard.start)
                at += segment.count

    def _all_to_all(self, values: np.ndarray, sent: list[int], received: list[int]) -> np.ndarray:
        if len(sent) == 1:
            return values
        device = self._grid.device
        output = torch.empty(sum(received), dtype=torch.float32, device=device)
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

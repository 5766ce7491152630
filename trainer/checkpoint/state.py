"""Stage and load a rank's part of a training's state: the flat float32 shards that its optimizer updates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor, nn

from griffin.parallel.sharding import Piece
from griffin.parallel.world.grid import Grid
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
    ChunkPart,
    Member,
    Parameter,
    PlacedTensor,
    SavePlan,
    Shard,
    plan_chunks,
    plan_parts,
)
from griffin.trainer.checkpoint.regions import move
from griffin.trainer.checkpoint.zarr_io import Array, open_array
from griffin.trainer.step import Training

READERS = 4  # chunks that a rank reads at a time, if it has as many cores


class ShardedState:
    """One rank's part of master weights and Adam moments, to save and to load. The constructor is a collective."""

    def __init__(self, training: Training, grid: Grid):
        self._training, self._grid = training, grid
        self._parameters = [parameter for stage in training.stages for parameter in stage.parameters()]
        # The second copy of the tied embedding is loaded, but the stage that owns the first one saves it.
        self._is_owned = [not getattr(parameter, "shared", False) for parameter in self._parameters]
        self._layouts = [parameter_layout(parameter) for parameter in self._parameters]
        ranges = [training.optimizer.shard_range(parameter) for parameter in self._parameters]
        virtual = [number for number, stage in enumerate(training.stages) for _ in stage.parameters()]
        owned = [
            ((number, grid.pipeline_rank), placed.tensor)
            for number, layout, is_owned in zip(virtual, self._layouts, self._is_owned, strict=True)
            for placed in layout.tensors
            if is_owned and grid.is_first_replica and grid.tensor_rank == 0
        ]
        kind = tuple[int, int, list[tuple[int, int]], list[tuple[tuple[int, int], GlobalTensor]]]
        everyone = grid.all_gather((grid.pipeline_rank, grid.tensor_rank, ranges, owned), kind)
        self._stage_ranks = [
            (rank, tensor_rank, ranges)
            for rank, (pipeline_rank, tensor_rank, ranges, _) in enumerate(everyone)
            if pipeline_rank == grid.pipeline_rank
        ]
        self.tensors = in_model_order(itertools.chain.from_iterable(owned for *_, owned in everyone))
        assert len({tensor.name for tensor in self.tensors}) == len(self.tensors), "two stages own one tensor"

    def save_plan(self) -> SavePlan:
        """This rank's part in every save: the chunks that it writes, and those that it holds a part of."""
        cuts = default_cuts(self.tensors)
        dtype = str(self._training.dtype).removeprefix("torch.")
        layouts = [layout for layout, owned in zip(self._layouts, self._is_owned, strict=True) if owned]
        members = self._members(self._is_owned)
        shapes = {tensor.name: chunk_shape(tensor, cuts) for tensor in self.tensors}
        chunks = plan_chunks(layouts, members, self._grid.tensor_size, shapes)
        shards = self._member(members).shards
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
            values = self._training.optimizer.shard_state(parameter)
            if values is None:
                continue
            master, exp_avg, exp_avg_sq = values
            size = master.numel()
            for row, value in zip(out[:, offset : offset + size], (master, exp_avg, exp_avg_sq), strict=True):
                if value is None:  # Adam creates its moments in the first step
                    row.zero_()
                else:
                    row.copy_(value, non_blocking=True)
            offset += size
        assert offset == out.shape[1], (offset, out.shape)
        if self._grid.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    @torch.no_grad()
    def load(self, folder: Path, manifest: Manifest, *, everything: bool) -> None:
        """Load the weights, and with `everything` Adam's state, from a checkpoint of any layout. A collective.

        Each rank reads the chunks that it holds a part of. The weights are then gathered over data-parallel ranks as
        after an optimizer step.

        Raises:
            ValueError: the checkpoint is of another model; nothing was changed.
            CheckpointError: a chunk is damaged; the message names the file.
        """
        kinds = [MASTER if f"{MASTER}.{self.tensors[0].name}" in manifest.arrays else MODEL]
        kinds += [EXP_AVG, EXP_AVG_SQ] if everything else []
        self._refuse_other_tensors(manifest, kinds)
        member = self._member(self._members([True] * len(self._parameters)))
        # One buffer, reused for all parameters: a small part of the state.
        buffer = np.empty(
            (len(kinds), max((shard.stop - shard.start for shard in member.shards), default=0)), np.float32
        )
        buffers = SimpleQueue[np.ndarray]()
        readers = min(READERS, max(2, torch.get_num_threads()))
        for _ in range(readers):
            buffers.put(np.empty(0, np.uint8))
        with ThreadPoolExecutor(readers) as pool:
            for number, (parameter, shard) in enumerate(zip(self._parameters, member.shards, strict=True)):
                if shard.stop == shard.start:
                    continue
                rows = buffer[:, : shard.stop - shard.start]
                self._read(pool, buffers, folder, manifest, kinds, number, member, rows)
                master, moments = torch.from_numpy(rows[0]), torch.from_numpy(rows[1:]) if everything else None
                self._training.optimizer.set_shard_state(parameter, master, moments)
        self._training.optimizer.gather_weights()
        if everything:
            assert manifest.optimizer is not None, "checked: the checkpoint holds more than weights"
            self._training.continue_after(manifest.step, manifest.optimizer["step"])

    def _read(
        self,
        pool: ThreadPoolExecutor,
        buffers: SimpleQueue[np.ndarray],
        folder: Path,
        manifest: Manifest,
        kinds: Sequence[str],
        number: int,
        member: Member,
        rows: np.ndarray,
    ) -> None:
        """Read this rank's shard of parameter `number` into `rows`: float32 [kinds, elements]."""
        layout, start = self._layouts[number], member.shards[number].start

        def read(row: np.ndarray, opened: Future[Array], part: ChunkPart) -> None:
            array, buffer = opened.result(), buffers.get()
            try:
                if buffer.size < array.file_bytes:
                    buffer = np.empty(array.file_bytes, np.uint8)
                values = array.read_chunk(part.index, manifest.files[array.spec.file(part.index)], buffer=buffer)
                values = values.astype(np.float32, copy=False).reshape(-1)
                for segment in part.segments:
                    move(values, segment.chunk, row, segment.local, segment.first, segment.last, start)
            finally:
                buffers.put(buffer)

        parts, planned, reads = list[ChunkPart](), dict[str, tuple[int, ...]](), list[Future[None]]()
        for row, kind in zip(rows, kinds, strict=True):
            specs = {placed.tensor.name: manifest.arrays[f"{kind}.{placed.tensor.name}"] for placed in layout.tensors}
            shapes = {name: spec.chunks for name, spec in specs.items()}
            if shapes != planned:  # mostly the same for all kinds
                parts = plan_parts(layout, number, member, self._grid.tensor_size, shapes)
                planned = shapes
            if sum(segment.count for part in parts for segment in part.segments) < row.size:
                assert any(spec.tensor.padded is not None for spec in specs.values()), f"{list(specs)} are not whole"
                row[:] = 0  # the vocabulary's padding is in no chunk
            # Submitted before the reads, which wait for them in threads of the same pool.
            arrays = {
                name: pool.submit(open_array, folder, specs[name]) for name in {part.tensor.name for part in parts}
            }
            reads += [pool.submit(read, row, arrays[part.tensor.name], part) for part in parts]
        for future in reads:
            future.result()

    def _members(self, chosen: Sequence[bool]) -> list[Member]:
        """The ranks with the same pipeline stages as this one, with their shards of the chosen parameters."""
        return [
            Member(rank, tensor_rank, shards_in_a_row(itertools.compress(ranges, chosen)))
            for rank, tensor_rank, ranges in self._stage_ranks
        ]

    def _member(self, members: Sequence[Member]) -> Member:
        return next(member for member in members if member.rank == self._grid.rank)

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


def in_model_order(tensors: Iterable[tuple[tuple[int, int], GlobalTensor]]) -> list[GlobalTensor]:
    """Sort tensors by (virtual stage, pipeline rank), so that a checkpoint is the same from any layout."""
    return [tensor for _, tensor in sorted(tensors, key=itemgetter(0))]


def parameter_layout(parameter: nn.Parameter) -> Parameter:
    """The local shape of a parameter, and the place of each global tensor in it."""
    return Parameter(tuple(parameter.shape), tuple(_placed(piece) for piece in parameter.pieces))  # type: ignore[attr-defined]


def shards_in_a_row(ranges: Iterable[tuple[int, int]]) -> tuple[Shard, ...]:
    """The shards of parameters that are staged one after the other."""
    shards, offset = [], 0
    for start, stop in ranges:
        shards.append(Shard(start, stop, offset))
        offset += stop - start
    return tuple(shards)


def global_tensor(piece: Piece) -> GlobalTensor:
    """The global tensor of a piece of a parameter."""
    return GlobalTensor(name=piece.name, shape=piece.shape, axis=piece.axis, atoms=piece.atoms, padded=piece.padded)


def _placed(piece: Piece) -> PlacedTensor:
    return PlacedTensor(global_tensor(piece), piece.dim, piece.start)


def _elements(shards: Sequence[Shard]) -> int:
    return sum(shard.stop - shard.start for shard in shards)

"""Load the weights of a checkpoint into a model without an optimizer, for generation and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from griffin.parallel.sharding import Piece
from griffin.parallel.stage import Stage
from griffin.parallel.world.grid import Grid
from griffin.trainer.checkpoint.arrays import MODEL, shape_of
from griffin.trainer.checkpoint.manifest import Manifest
from griffin.trainer.checkpoint.state import global_tensor
from griffin.trainer.checkpoint.zarr_io import open_array

READERS = 4  # tensors that a rank reads at a time, each with one chunk more in memory


def load_weights(stages: Sequence[Stage], grid: Grid, folder: Path, manifest: Manifest) -> None:
    """Load this rank's parameters from the model arrays of a step, rounded to the parameters' dtype.

    Raises CheckpointError naming the file if a chunk is missing or damaged.
    """
    parts = [
        (piece, piece.view(parameter, grid.tensor_size))
        for stage in stages
        for parameter in stage.parameters()
        for piece in parameter.pieces  # type: ignore[attr-defined]
    ]

    @torch.no_grad()  # grad mode is per thread
    def fill(part: tuple[Piece, Tensor]) -> None:
        piece, out = part
        spec = manifest.arrays[f"{MODEL}.{piece.name}"]
        assert spec.shape == piece.shape, (piece.name, spec.shape, piece.shape)
        box = global_tensor(piece).part(grid.tensor_rank, grid.tensor_size)
        if 0 not in shape_of(box):  # otherwise padding of the vocabulary only
            records = {index: manifest.files[spec.file(index)] for index in spec.indices()}
            values = open_array(folder, spec).read(box, records)
            out[tuple(slice(size) for size in shape_of(box))].copy_(_tensor(values, spec.dtype))
        if piece.axis is not None:
            held = shape_of(box)[piece.axis]
            out.narrow(piece.axis, held, out.shape[piece.axis] - held).zero_()

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(fill, parts):
            pass


def _tensor(values: np.ndarray, dtype: str) -> Tensor:
    """A tensor that shares the memory of `values`. torch does not take numpy's bfloat16."""
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)

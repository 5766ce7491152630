"""Tensors of other formats' files, read as this project's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from griffin.tools.common.safetensors_files import Entry, read_box
from griffin.tools.weights.axis_map import AxisMap
from griffin.trainer.checkpoint.arrays import MODEL, ArraySpec, Box, GlobalTensor


@dataclass(frozen=True)
class FileArray:
    """A tensor that lies row-major in a file; ours may be a part of it."""

    path: Path
    entry: Entry
    axes: AxisMap
    spec: ArraySpec

    def read(self, box: Box) -> np.ndarray:
        """As `StoredArray.read`."""
        return self.axes.ours(read_box(self.path, self.entry, self.axes.foreign_box(box)))


def foreign_spec(tensor: GlobalTensor, dtype: str) -> ArraySpec:
    """Of a weight as other files hold it, which know no chunks."""
    return ArraySpec(kind=MODEL, tensor=tensor, dtype=dtype, chunks=tensor.shape)

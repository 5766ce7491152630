"""Tensors in files of other formats, read in this project's shape and order of axes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from griffin.tools.common.safetensors_files import Entry, read_box
from griffin.tools.weights.axis_map import AxisMap
from griffin.trainer.checkpoint.arrays import MODEL, ArraySpec, Box, GlobalTensor


@dataclass(frozen=True)
class FileArray:
    """A canonical tensor stored row-major in a file, perhaps as a part of a larger tensor."""

    path: Path
    entry: Entry
    axes: AxisMap
    spec: ArraySpec

    def read(self, box: Box) -> np.ndarray:
        """As `StoredArray.read`."""
        return self.axes.to_canonical(read_box(self.path, self.entry, self.axes.foreign_box(box)))


def foreign_spec(tensor: GlobalTensor, dtype: str) -> ArraySpec:
    """Return the spec of a weight in a foreign file, which has no chunks."""
    return ArraySpec(kind=MODEL, tensor=tensor, dtype=dtype, chunks=tensor.shape)

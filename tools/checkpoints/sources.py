"""Arrays of checkpoints as tools read them: any box of one, whatever it is stored in, a bounded part at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from griffin.trainer.checkpoint.arrays import ArraySpec, Box
from griffin.trainer.checkpoint.manifest import Manifest, check
from griffin.trainer.checkpoint.zarr_io import Array, FileRecord, open_array


class StoredArray(Protocol):
    """An array that worker processes read; it travels by pickle."""

    @property
    def spec(self) -> ArraySpec: ...

    def read(self, box: Box) -> np.ndarray:
        """The box, [box's shape] of `spec.dtype`. Raises CheckpointError naming a file that is missing or damaged."""
        ...


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint to read from: its manifest, and its arrays by name."""

    path: Path
    manifest: Manifest
    arrays: Mapping[str, StoredArray]


@dataclass(frozen=True)
class ZarrArray:
    """An array of a step's folder, with what the manifest says of each chunk."""

    folder: Path
    spec: ArraySpec
    records: Mapping[tuple[int, ...], FileRecord]

    def read(self, box: Box) -> np.ndarray:
        """As `StoredArray.read`, with one chunk besides the result in memory."""
        return open_cached(self.folder, self.spec).read(box, self.records)


def open_step(folder: Path) -> SourceCheckpoint:
    """A step's folder. Raises CheckpointError where it is not complete."""
    manifest = check(folder)
    arrays = {
        name: ZarrArray(folder, spec, {index: manifest.files[spec.file(index)] for index in spec.indices()})
        for name, spec in manifest.arrays.items()
    }
    return SourceCheckpoint(folder, manifest, arrays)


@functools.lru_cache(maxsize=64)
def open_cached(folder: Path, spec: ArraySpec) -> Array:
    """The open array, which a worker uses for many chunks."""
    return open_array(folder, spec)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype are equal bit by bit, which NaN is and 0 and -0 are not."""
    return np.array_equal(bits(a), bits(b))


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")

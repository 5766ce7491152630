"""Checkpoints as tools read them: any box of any array, whatever the storage format, in bounded memory."""

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
    """An array that worker processes read. Instances are pickled to the workers."""

    @property
    def spec(self) -> ArraySpec: ...

    def read(self, box: Box) -> np.ndarray:
        """Read a box: [box's shape] of `spec.dtype`. Raises CheckpointError naming a missing or damaged file."""
        ...


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint to read from: its manifest and its arrays by name."""

    path: Path
    manifest: Manifest
    arrays: Mapping[str, StoredArray]


@dataclass(frozen=True)
class ZarrArray:
    """An array of a step's folder, with the manifest's record of each chunk.

    It is read by our own chunk reader, not by zarr: workers start without that import, every chunk is compared with
    the manifest, and errors name the damaged file.
    """

    folder: Path
    spec: ArraySpec
    records: Mapping[tuple[int, ...], FileRecord]

    def read(self, box: Box) -> np.ndarray:
        """As `StoredArray.read`; holds one chunk besides the result in memory."""
        return open_cached(self.folder, self.spec).read(box, self.records)


def open_step(folder: Path) -> SourceCheckpoint:
    """Open a step's folder. Raises CheckpointError if it is not complete."""
    manifest = check(folder)
    arrays = {
        name: ZarrArray(folder, spec, {index: manifest.files[spec.file(index)] for index in spec.indices()})
        for name, spec in manifest.arrays.items()
    }
    return SourceCheckpoint(folder, manifest, arrays)


@functools.lru_cache(maxsize=64)
def open_cached(folder: Path, spec: ArraySpec) -> Array:
    """Open an array; cached, since a worker reads or writes many chunks of one array."""
    return open_array(folder, spec)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype are bitwise equal: equal NaNs are, 0 and -0 are not."""
    return np.array_equal(bits(a), bits(b))


def bits(values: np.ndarray) -> np.ndarray:
    """View values as unsigned integers of the same size."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")

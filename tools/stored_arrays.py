"""Arrays of checkpoints as tools read them: any box of one, whatever it is stored in, a bounded part at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from griffin.trainer.checkpoint.arrays import ArraySpec, Box, numpy_dtype
from griffin.trainer.checkpoint.manifest import Manifest, check
from griffin.trainer.checkpoint.zarr_io import Array, CheckpointError, FileRecord, open_array


class StoredArray(Protocol):
    """An array that worker processes read; it travels by pickle."""

    @property
    def spec(self) -> ArraySpec: ...

    def read(self, box: Box) -> np.ndarray:
        """The box, [box's shape] of `spec.dtype`. Raises CheckpointError naming a file that is missing or damaged."""
        ...


@dataclass(frozen=True)
class Source:
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
        array = opened(self.folder, self.spec)
        values = np.empty(shape_of(box), numpy_dtype(self.spec.dtype))
        for index in chunks_of(self.spec, box):
            common = intersection(self.spec.box(index), box)
            values[within(common, box)] = array.read(common)
            if array.record(index) != self.records[index]:
                raise CheckpointError(f"{self.folder / self.spec.file(index)} is not the chunk that was saved")
        return values


def open_step(folder: Path) -> Source:
    """A step's folder. Raises CheckpointError where it is not complete."""
    manifest = check(folder)
    arrays = {
        name: ZarrArray(folder, spec, {index: manifest.files[spec.file(index)] for index in spec.indices()})
        for name, spec in manifest.arrays.items()
    }
    return Source(folder, manifest, arrays)


@functools.lru_cache(maxsize=64)
def opened(folder: Path, spec: ArraySpec) -> Array:
    """The open array, which a worker uses for many chunks."""
    return open_array(folder, spec)


def chunks_of(spec: ArraySpec, box: Box) -> Iterator[tuple[int, ...]]:
    """Places of the chunks that a box touches."""
    return itertools.product(
        *(range(part.start // chunk, -(-part.stop // chunk)) for part, chunk in zip(box, spec.chunks, strict=True))
    )


def intersection(a: Box, b: Box) -> Box:
    return tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))


def within(box: Box, outer: Box) -> Box:
    """A box's place in an outer one."""
    return tuple(slice(x.start - y.start, x.stop - y.start) for x, y in zip(box, outer, strict=True))


def shape_of(box: Sequence[slice]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype are equal bit by bit, which NaN is and 0 and -0 are not."""
    return np.array_equal(bits(a), bits(b))


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")

"""Reading and writing the Zarr v3 arrays of a checkpoint, chunk by chunk, with tensorstore."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore

from griffin.trainer.checkpoint.arrays import ArraySpec, Box, numpy_dtype

CRC_BYTES = 4  # a chunk's file ends with the crc32c of what precedes it, little endian


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is incomplete or is damaged; the message names the file."""


@dataclass(frozen=True)
class FileRecord:
    """What a file of a checkpoint must be: its size in bytes and "algorithm:hex", a checksum of its content.

    A chunk's is the crc32c that its file ends with ("crc32c:1a2b3c4d"), that of other files "sha256:...".
    """

    size: int
    checksum: str


def io_context(*, copies: int = 2, files: int = 8) -> tensorstore.Context:
    """Limits of tensorstore: threads that copy and check data, files read or written at once.

    Files are synchronised before a write is done. They are not locked: a chunk has one writer, each file is written
    under a name of its own and renamed, and there are file systems without locks.
    """
    return tensorstore.Context(
        {
            "data_copy_concurrency": {"limit": copies},
            "file_io_concurrency": {"limit": files},
            "file_io_sync": True,
            "file_io_locking": {"mode": "none"},
        }
    )


_CONTEXT = io_context()


def _problem(folder: Path, error: Exception) -> CheckpointError:
    # tensorstore appends the whole specification, and does not always name the file.
    text = re.sub(r" ?\[tensorstore_spec='.*'\]", "", str(error), flags=re.DOTALL)
    return CheckpointError(text if str(folder) in text else f"{folder}: {text}")


def _metadata(spec: ArraySpec) -> dict[str, Any]:
    tensor = spec.tensor
    return {
        "shape": list(spec.shape),
        # Stock Zarr readers know no bfloat16: array[:].view(ml_dtypes.bfloat16).
        "data_type": "uint16" if spec.dtype == "bfloat16" else spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": 0,
        "attributes": {"dtype": spec.dtype, "axis": tensor.axis, "atoms": tensor.atoms, "padded": tensor.padded},
    }


def _open(folder: Path, spec: ArraySpec, context: tensorstore.Context | None, *, create: bool) -> Array:
    description = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder / spec.name}/"},
        "metadata": _metadata(spec),
        "store_data_equal_to_fill_value": True,  # a chunk of zeros is a file as well, so that none can go missing
        "fill_missing_data_reads": False,
    }
    try:
        store = tensorstore.open(description, context=context or _CONTEXT, open=True, create=create).result()
    except (ValueError, OSError, NotImplementedError) as error:
        raise _problem(folder / spec.metadata_file, error) from None
    return Array(folder, spec, store)


def create_array(folder: Path, spec: ArraySpec, context: tensorstore.Context | None = None) -> Array:
    """Create an array in a step's folder, or open it; several processes may do so at once.

    Raises:
        CheckpointError: it cannot be written, or is there with other metadata.
    """
    return _open(folder, spec, context, create=True)


def open_array(folder: Path, spec: ArraySpec, context: tensorstore.Context | None = None) -> Array:
    """Open an array of a step's folder, for reading.

    Raises:
        CheckpointError: its zarr.json is missing or is not that of `spec`.
    """
    return _open(folder, spec, context, create=False)


class Array:
    """An open array; its methods may be called from several threads."""

    def __init__(self, folder: Path, spec: ArraySpec, store: Any) -> None:
        self.folder = folder
        self.spec = spec
        self._store = store

    def write(self, index: tuple[int, ...], values: np.ndarray) -> Write:
        """Start to write the whole chunk at `index` of the grid.

        Args:
            index: the chunk's place in the grid.
            values: of `spec.dtype` and the shape of `spec.box(index)`; not to be changed until the write is done.
        """
        box = self.spec.box(index)
        assert values.dtype == numpy_dtype(self.spec.dtype), (self.spec.name, values.dtype)
        assert values.shape == tuple(part.stop - part.start for part in box), (self.spec.name, index, values.shape)
        if self.spec.dtype == "bfloat16":
            values = values.view(np.uint16)
        # Nothing is cached, so that tensorstore lets go of the values when the write is done: no copy is needed.
        return Write(self, index, self._store[box].write(values, can_reference_source_data_indefinitely=True))

    def read(self, box: Box) -> np.ndarray:
        """A box of the array, [box's shape] of `spec.dtype` (a new array).

        Raises:
            CheckpointError: a chunk in the box is missing, too short or does not match its checksum.
        """
        try:
            values = self._store[box].read().result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise _problem(self.folder / self.spec.name, error) from None
        return values.view(ml_dtypes.bfloat16) if self.spec.dtype == "bfloat16" else values

    def record(self, index: tuple[int, ...]) -> FileRecord:
        """The size and the checksum of a chunk's file as it is stored, from the file's end: data is not read.

        Raises:
            CheckpointError: the file is missing, cannot be read or is not of its size.
        """
        path = self.folder / self.spec.file(index)
        expected = math.prod(self.spec.chunks) * numpy_dtype(self.spec.dtype).itemsize + CRC_BYTES
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected:
                    raise CheckpointError(f"{path} has {size:,} bytes instead of {expected:,}")
                file.seek(-CRC_BYTES, os.SEEK_END)
                crc = int.from_bytes(file.read(CRC_BYTES), "little")
        except OSError as error:
            raise CheckpointError(str(error)) from None
        return FileRecord(size, f"crc32c:{crc:08x}")


class Write:
    """A chunk being written."""

    def __init__(self, array: Array, index: tuple[int, ...], futures: Any) -> None:
        self.array = array
        self.index = index
        self._futures = futures
        futures.commit.force()  # start now, not when the result is asked for

    def result(self) -> FileRecord:
        """Wait until the chunk's file is on disk, synchronised.

        Raises:
            CheckpointError: it could not be written (the disk is full, the folder is gone, ...).
        """
        try:
            self._futures.commit.result()
        except (ValueError, OSError, NotImplementedError, MemoryError) as error:
            raise _problem(self.array.folder / self.array.spec.file(self.index), error) from None
        return self.array.record(self.index)

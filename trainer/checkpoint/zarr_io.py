"""Read and write the Zarr v3 arrays of a checkpoint, chunk by chunk.

A chunk's file holds its values, little endian and row-major, and their crc32c: Zarr's codecs `bytes` and `crc32c`.
Chunks at the edge of an array are padded with zeros.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import google_crc32c
import numpy as np

from griffin.parallel.world.ranks import RunError
from griffin.trainer.checkpoint.arrays import ArraySpec, Box, intersection, numpy_dtype, shape_of, within
from griffin.trainer.files import open_regular, parse_json, read_regular

assert sys.byteorder == "little", "values are stored as they lie in memory"

SYNCS = 16  # files that a process synchronises at a time: file systems commit many together in few writes
BLOCK_BYTES = 2**20  # read or written and checksummed at a time, so that it stays in the CPU's cache
CRC_BYTES = 4  # at the end of a chunk's file: the crc32c of what precedes it, little endian


class CheckpointError(RunError, ValueError):
    """A checkpoint that cannot be written, is incomplete or is damaged; the message names the file."""


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes of a file of a checkpoint, and a checksum of its content as "algorithm:hex".

    For a chunk this is the crc32c at the end of its file ("crc32c:1a2b3c4d"), for other files "sha256:...".
    """

    size: int
    checksum: str


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from None


def _metadata(spec: ArraySpec) -> dict[str, Any]:
    tensor = spec.tensor
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        # Zarr has no bfloat16; readers use array[:].view(ml_dtypes.bfloat16).
        "data_type": "uint16" if spec.dtype == "bfloat16" else spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": 0 if spec.dtype == "bfloat16" else 0.0,
        "attributes": {"dtype": spec.dtype, "axis": tensor.axis, "atoms": tensor.atoms, "padded": tensor.padded},
    }


def create_array(folder: Path, spec: ArraySpec) -> Array:
    """Create an array in a step's folder, or open it if it exists; several processes may do so at once.

    `Array.synchronise` makes it durable.

    Raises:
        CheckpointError: it cannot be written, or exists with other metadata.
    """
    path = folder / spec.metadata_file
    with naming(path):
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            # Renamed once complete. Other processes that create it write the same content.
            aside = path.with_name(f"zarr.json.{secrets.token_hex(8)}")
            with open(aside, "x", encoding="utf-8") as file:
                json.dump(_metadata(spec), file, sort_keys=True, separators=(",", ":"))
                _start_writing(file)
            aside.replace(path)
    return open_array(folder, spec)


def open_array(folder: Path, spec: ArraySpec) -> Array:
    """Open an array of a step's folder.

    Raises:
        CheckpointError: its zarr.json is missing or does not match `spec`.
    """
    path = folder / spec.metadata_file
    with naming(path):
        text = read_regular(path)
    found: Any = None
    with suppress(ValueError):
        found = parse_json(text)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is no Zarr metadata")
    expected = _metadata(spec)
    for key in sorted(expected.keys() | found.keys()):
        if key not in found or key not in expected or found[key] != expected[key]:
            there, here = (json.dumps(one[key]) if key in one else "missing" for one in (found, expected))
            raise CheckpointError(f"{path}: {key} is {there}, must be {here}")
    return Array(folder, spec)


class Array:
    """An array in a step's folder; its methods may be called from several threads."""

    def __init__(self, folder: Path, spec: ArraySpec) -> None:
        self.folder = folder
        self.spec = spec

    def synchronise(self) -> None:
        """Synchronise its metadata and its folder's entries to disk, as far as this machine has written them.

        Raises:
            CheckpointError: they could not be written.
        """
        path = self.folder / self.spec.metadata_file
        with naming(path):
            synchronise(path)
            synchronise(path.parent)

    def write(self, index: tuple[int, ...], values: np.ndarray) -> Write:
        """Start to write a chunk that has not been written yet; `Write.result` waits for it.

        Args:
            index: the chunk's index in the chunk grid.
            values: [shape of `spec.box(index)`] of `spec.dtype`.

        Raises:
            CheckpointError: it cannot be written (the disk is full, the folder is gone, ...) or exists.
        """
        spec = self.spec
        shape = shape_of(spec.box(index))
        assert values.dtype == numpy_dtype(spec.dtype), (spec.name, values.dtype)
        assert values.shape == shape, (spec.name, index, values.shape)
        if shape != spec.chunks:
            whole = np.zeros(spec.chunks, values.dtype)
            whole[tuple(slice(size) for size in shape)] = values
            values = whole
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        path, crc = self.folder / spec.file(index), 0
        with naming(path):
            file = open(path, "xb")  # noqa: SIM115 (Write.result closes it)
            try:
                for block in _blocks(data):
                    crc = _crc32c(crc, block)
                    file.write(memoryview(block))  # type: ignore[arg-type]
                file.write(crc.to_bytes(CRC_BYTES, "little"))
                _start_writing(file)
            except BaseException:
                with suppress(OSError):
                    file.close()
                with suppress(OSError):
                    path.unlink()
                raise
        return Write(path, file, _record(data.nbytes, crc))

    def read_chunk(
        self, index: tuple[int, ...], record: FileRecord | None = None, *, buffer: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a chunk: [shape of `spec.box(index)`] of `spec.dtype`.

        Args:
            index: the chunk's index in the chunk grid.
            record: that of its file in the manifest, to compare with.
            buffer: uint8 [at least `file_bytes`], memory for the result; a new buffer by default.

        Raises:
            CheckpointError: it is missing, has another size, or does not match its checksum or `record`.
        """
        spec = self.spec
        path = self.folder / spec.file(index)
        expected = self.file_bytes
        with naming(path), open_regular(path, buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                raise CheckpointError(f"{path} has {size:,} bytes instead of {expected:,}")
            content = (np.empty(size, np.uint8) if buffer is None else buffer)[: size - CRC_BYTES]
            crc = 0
            for block in _blocks(content):
                _fill(file, block, path)
                crc = _crc32c(crc, block)
            end = np.empty(CRC_BYTES, np.uint8)
            _fill(file, end, path)
        stored = int.from_bytes(end.tobytes(), "little")
        if crc != stored:
            raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
        if record is not None and record != _record(content.nbytes, stored):
            raise CheckpointError(f"{path} is not the chunk that was saved")
        values = content.view(numpy_dtype(spec.dtype)).reshape(spec.chunks)
        return values[tuple(slice(size) for size in shape_of(spec.box(index)))]

    def read(self, box: Box, records: Mapping[tuple[int, ...], FileRecord] | None = None) -> np.ndarray:
        """Read a box of the array: [box's shape] of `spec.dtype`. Holds one chunk more in memory.

        Raises:
            CheckpointError: a chunk in the box is missing, has another size, or does not match its checksum or its
                record in `records` (by index in the chunk grid).
        """
        places = [
            range(part.start // chunk, -(-part.stop // chunk))
            for part, chunk in zip(box, self.spec.chunks, strict=True)
        ]
        values = np.empty(shape_of(box), numpy_dtype(self.spec.dtype))
        for index in itertools.product(*places):
            chunk = self.spec.box(index)
            common = intersection(chunk, box)
            read = self.read_chunk(index, None if records is None else records[index])
            values[within(common, box)] = read[within(common, chunk)]
        return values

    @property
    def file_bytes(self) -> int:
        """The size of each chunk's file."""
        return math.prod(self.spec.chunks) * numpy_dtype(self.spec.dtype).itemsize + CRC_BYTES


class Write:
    """A chunk whose write is in progress. Start many before waiting: waiting for each in turn takes far longer."""

    def __init__(self, path: Path, file: BinaryIO, record: FileRecord) -> None:
        self.size = record.size
        self._path, self._file, self._record = path, file, record

    def result(self) -> FileRecord:
        """Wait until the chunk's file is synchronised to disk, and return its record. To be called once.

        Raises:
            CheckpointError: it could not be written (the disk is full, the folder is gone, ...).
        """
        with naming(self._path), self._file as file:
            os.fsync(file.fileno())
        return self._record

    def close(self) -> None:
        """Close the file without waiting for the disk."""
        with suppress(OSError):
            self._file.close()


def synchronise(path: Path) -> None:
    """Synchronise a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _record(content: int, crc: int) -> FileRecord:
    return FileRecord(content + CRC_BYTES, f"crc32c:{crc:08x}")


def _start_writing(file: IO[Any]) -> None:
    """Have the system start to write a file to disk, so that the final fsync has little left to wait for.

    Linux starts the write-back of pages that it is told are no longer needed.
    """
    file.flush()
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _blocks(data: np.ndarray) -> Iterator[np.ndarray]:
    return (data[start : start + BLOCK_BYTES] for start in range(0, data.size, BLOCK_BYTES))


def _crc32c(crc: int, data: np.ndarray) -> int:
    """The crc32c `crc` of earlier data, extended by `data`."""
    view = data.view()
    view.flags.writeable = False  # the library accepts only read-only buffers
    return google_crc32c.extend(crc, view)


def _fill(file: Any, data: np.ndarray, path: Path) -> None:
    """Fill `data` from a file; a single read may return fewer bytes."""
    view = memoryview(data)  # type: ignore[arg-type]
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{path} ends {view.nbytes:,} bytes early")
        view = view[count:]

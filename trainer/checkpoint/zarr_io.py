"""Reading and writing the Zarr v3 arrays of a checkpoint, chunk by chunk.

A chunk's file is its values, little endian and row-major, and their crc32c: Zarr's codecs `bytes` and `crc32c`. Chunks
at an array's edge are filled up with zeros.
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

SYNCS = 16  # files that one process makes durable at a time: file systems do many together in few writes of their own
BLOCK_BYTES = 2**20  # read or written, and added to the checksum, while it is in the processor's cache
CRC_BYTES = 4  # a chunk's file ends with the crc32c of what precedes it, little endian


class CheckpointError(RunError, ValueError):
    """A checkpoint that cannot be written, is incomplete or is damaged; the message names the file."""


@dataclass(frozen=True)
class FileRecord:
    """What a file of a checkpoint must be: its size in bytes and "algorithm:hex", a checksum of its content.

    A chunk's is the crc32c that its file ends with ("crc32c:1a2b3c4d"), that of other files "sha256:...".
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
        # Stock Zarr readers know no bfloat16: array[:].view(ml_dtypes.bfloat16).
        "data_type": "uint16" if spec.dtype == "bfloat16" else spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": 0 if spec.dtype == "bfloat16" else 0.0,
        "attributes": {"dtype": spec.dtype, "axis": tensor.axis, "atoms": tensor.atoms, "padded": tensor.padded},
    }


def create_array(folder: Path, spec: ArraySpec) -> Array:
    """Create an array in a step's folder, or open it; several processes may do so at once.

    What this machine has made of it is durable after `Array.synchronise`.

    Raises:
        CheckpointError: it cannot be written, or is there with other metadata.
    """
    path = folder / spec.metadata_file
    with naming(path):
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            # Whoever finds the file finds all of it; who else creates it has the same content.
            aside = path.with_name(f"zarr.json.{secrets.token_hex(8)}")
            with open(aside, "x", encoding="utf-8") as file:
                json.dump(_metadata(spec), file, sort_keys=True, separators=(",", ":"))
                _start_writing(file)
            aside.replace(path)
    return open_array(folder, spec)


def open_array(folder: Path, spec: ArraySpec) -> Array:
    """Open an array of a step's folder.

    Raises:
        CheckpointError: its zarr.json is missing or is not that of `spec`.
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
        """Make its metadata and its folder's entries durable, as far as this machine has written them.

        Raises:
            CheckpointError: they could not be written.
        """
        path = self.folder / self.spec.metadata_file
        with naming(path):
            synchronise(path)
            synchronise(path.parent)

    def write(self, index: tuple[int, ...], values: np.ndarray) -> Write:
        """Write the whole chunk at `index` of the grid, which has not been written yet.

        Args:
            index: the chunk's place in the grid.
            values: of `spec.dtype` and the shape of `spec.box(index)`.

        Raises:
            CheckpointError: it cannot be written (the disk is full, the folder is gone, ...) or is there already.
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
        """The chunk at `index` of the grid, [shape of `spec.box(index)`] of `spec.dtype`.

        Args:
            index: the chunk's place in the grid.
            record: what its file must be.
            buffer: uint8 [at least `file_bytes`], whose memory the result takes; a new one by default.

        Raises:
            CheckpointError: it is missing, is not of its size, does not match its checksum, or is not the file that
                `record` is of.
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
        """A box of the array, [box's shape] of `spec.dtype` (a new array), with one chunk besides it in memory.

        Raises:
            CheckpointError: a chunk in the box is missing, is not of its size, does not match its checksum, or is not
                the one that `records` has at its place in the grid.
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
    """A chunk that the system is writing. Wait for many of them together: for each alone, it takes far longer."""

    def __init__(self, path: Path, file: BinaryIO, record: FileRecord) -> None:
        self.size = record.size
        self._path, self._file, self._record = path, file, record

    def result(self) -> FileRecord:
        """Wait until the chunk's file is on disk, synchronised. To be called once.

        Raises:
            CheckpointError: it could not be written (the disk is full, the folder is gone, ...).
        """
        with naming(self._path), self._file as file:
            os.fsync(file.fileno())
        return self._record

    def close(self) -> None:
        """Do without the result: what is on disk is not waited for."""
        with suppress(OSError):
            self._file.close()


def synchronise(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _record(content: int, crc: int) -> FileRecord:
    return FileRecord(content + CRC_BYTES, f"crc32c:{crc:08x}")


def _start_writing(file: IO[Any]) -> None:
    """Have the system write a file to the disk from now on, so that little is left to wait for in the end.

    What Linux is told not to keep, it begins to write at once.
    """
    file.flush()
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _blocks(data: np.ndarray) -> Iterator[np.ndarray]:
    return (data[start : start + BLOCK_BYTES] for start in range(0, data.size, BLOCK_BYTES))


def _crc32c(crc: int, data: np.ndarray) -> int:
    """The checksum of what `crc` is the checksum of, and `data` after it."""
    view = data.view()
    view.flags.writeable = False  # the library takes nothing else
    return google_crc32c.extend(crc, view)


def _fill(file: Any, data: np.ndarray, path: Path) -> None:
    """Read as many bytes as `data` takes; one call to the system may read less."""
    view = memoryview(data)  # type: ignore[arg-type]
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{path} ends {view.nbytes:,} bytes early")
        view = view[count:]

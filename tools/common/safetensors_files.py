"""Lay out, write and read safetensors files a part at a time. The safetensors library reads and writes whole tensors.

A file consists of the length of its header (8 bytes), the header (JSON with dtype, shape and offsets of each tensor),
and the tensors' values, little endian and row-major, without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from griffin.trainer.checkpoint.arrays import Box, numpy_dtype, shape_of
from griffin.trainer.checkpoint.zarr_io import CheckpointError, naming
from griffin.trainer.files import is_integer, open_regular, parse_json

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
READ_BYTES = 16 * 2**20  # read at once where only some columns of many rows are needed
_NAMES = {short: name for name, short in DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # limit of other readers
_MOST_DIMENSIONS = 32
_MOST_INTEGER = 2**62


@dataclass(frozen=True)
class Entry:
    """A tensor stored from byte `offset` of its file on."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * numpy_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[Entry]]:
    """Return a file's header as bytes and its entries, for (name, dtype, shape) of each tensor in storage order.

    All values are aligned if larger dtypes come first.
    """
    described: dict[str, Any] = {_METADATA: {"format": "pt"}}
    placed, end = [], 0
    for name, dtype, shape in tensors:
        entry = Entry(name, dtype, shape, end)
        end += entry.nbytes
        described[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [entry.offset, end]}
        placed.append(entry)
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, [Entry(entry.name, entry.dtype, entry.shape, entry.offset + len(header)) for entry in placed]


def create_file(path: Path, header: bytes, size: int) -> None:
    """Create a file of its final size with its header."""
    with open(path, "xb") as stream:
        stream.write(header)
        stream.truncate(size)
        stream.flush()
        os.fsync(stream.fileno())


def write_values(path: Path, values: Sequence[tuple[int, np.ndarray]], *, durable: bool = True) -> None:
    """Write arrays at their offsets into a file. Unless `durable`, the caller must `synchronise` it on this machine."""
    with open(path, "r+b", buffering=0) as stream:
        for offset, array in values:
            stream.seek(offset)
            rest = np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
            while rest:
                rest = rest[stream.write(rest) :]
        if durable:
            os.fsync(stream.fileno())
        else:  # Linux starts to write back at once what it is told not to cache
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """Read `count` bytes of a file as uint8. Raises CheckpointError if the file is missing or too short."""
    with naming(path), open_regular(path, buffering=0) as file:
        missing = offset + count - os.fstat(file.fileno()).st_size
        if missing > 0:
            raise CheckpointError(f"{path} is {missing:,} bytes too short")
        return np.fromfile(file, np.uint8, count, offset=offset)


def require_written(path: Path, offset: int, values: np.ndarray) -> None:
    """Raise CheckpointError unless the file holds `values` at `offset`."""
    expected = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    if not np.array_equal(read_bytes(path, offset, values.nbytes), expected):
        raise CheckpointError(f"{path} does not hold what was written to it")


def read_box(path: Path, entry: Entry, box: Box) -> np.ndarray:
    """Read a box of a tensor: [box's shape] of its dtype, with READ_BYTES besides it in memory.

    Raises CheckpointError if the file is missing or too short.
    """
    values = np.empty(shape_of(box), numpy_dtype(entry.dtype))
    _read_box(path, entry, box, values)
    return values


def _read_box(path: Path, entry: Entry, box: Box, out: np.ndarray) -> None:
    rows, *columns = box
    if columns and entry.row_bytes > READ_BYTES:
        for row in range(rows.start, rows.stop):
            below = replace(entry, shape=entry.shape[1:], offset=entry.offset + row * entry.row_bytes)
            _read_box(path, below, tuple(columns), out[row - rows.start])
        return
    step = max(1, READ_BYTES // max(1, entry.row_bytes))
    for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        read = read_bytes(path, entry.offset + first * entry.row_bytes, (last - first) * entry.row_bytes)
        read = read.view(out.dtype).reshape(last - first, *entry.shape[1:])
        out[first - rows.start : last - rows.start] = read[(slice(None), *columns)]


def read_entries(path: Path) -> dict[str, Entry]:
    """Read the header of a file: its tensors by name. Values are not read.

    Raises CheckpointError naming the file if its header is damaged, its size is not what the header says, or a tensor's
    dtype is not in DTYPES.
    """
    with naming(path):
        size = path.stat().st_size
    length = int.from_bytes(read_bytes(path, 0, _LENGTH_BYTES).tobytes(), "little")
    if not 0 < length <= _MOST_HEADER_BYTES:
        raise CheckpointError(f"{path}: is not a safetensors file, or is damaged: its header has {length:,} bytes")
    text = read_bytes(path, _LENGTH_BYTES, length).tobytes()
    begin = _LENGTH_BYTES + length
    try:
        described = parse_json(text)
        described.pop(_METADATA, None)
        entries = [_entry(path, name, values, begin) for name, values in described.items()]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: is damaged: its header is not that of a safetensors file") from None
    end = begin
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise CheckpointError(
                f"{path}: is damaged: {entry.name} begins at byte {entry.offset:,} instead of {end:,}"
            )
        end += entry.nbytes
    if size != end:
        raise CheckpointError(f"{path} has {size:,} bytes instead of {end:,}")
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, values: Mapping[str, Any], begin: int) -> Entry:
    if values["dtype"] not in _NAMES:
        raise CheckpointError(f"{path}: {name} is of dtype {values['dtype']}; must be {', '.join(_NAMES)}")
    first, last = values["data_offsets"]
    shape = tuple(values["shape"])
    numbers = (first, last, *shape)
    if len(shape) > _MOST_DIMENSIONS or not all(is_integer(number, 0, _MOST_INTEGER) for number in numbers):
        raise TypeError
    entry = Entry(name, _NAMES[values["dtype"]], shape, begin + first)
    if last - first != entry.nbytes:
        raise CheckpointError(
            f"{path}: is damaged: {name} has {last - first:,} bytes instead of {entry.nbytes:,} for its shape"
        )
    return entry

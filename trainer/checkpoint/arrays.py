"""The arrays of a checkpoint: one per kind and global tensor, in chunks that depend on the model, not on its layout.

Does not import torch: the saving processes and the tools start without it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

MODEL = "model"  # the weights that the model computes with
MASTER = "optimizer.master"  # float32 weights that the optimizer updates, where the model's are not float32
EXP_AVG = "optimizer.exp_avg"  # Adam's first moment
EXP_AVG_SQ = "optimizer.exp_avg_sq"  # Adam's second moment
KINDS = (MODEL, MASTER, EXP_AVG, EXP_AVG_SQ)

CHUNK_BYTES = 64 * 2**20  # largest chunk, of float32
WHOLE_BYTES = 16 * 2**20  # a float32 tensor up to this size is one chunk: many small files cost more than they save
COVERED_TENSOR_SIZE = 8  # up to this tensor-parallel size, a rank's part of an array is whole chunks

Box = tuple[slice, ...]

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of "float32", "float16" or "bfloat16"."""
    return np.dtype(DTYPES[name])


@dataclass(frozen=True, kw_only=True)
class GlobalTensor:
    """A tensor of the whole model, under its canonical name."""

    name: str
    shape: tuple[int, ...]
    axis: int | None = None  # dimension that is sharded over tensor ranks; None: replicated over them
    atoms: int = 1  # equal parts of the axis that may be distributed; every tensor-parallel size divides it
    padded: int | None = None  # size of the axis in memory, where larger than in `shape` (the vocabulary)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def axis_size(self) -> int:
        assert self.axis is not None
        return self.padded or self.shape[self.axis]

    def part(self, tensor_rank: int, tensor_size: int) -> Box:
        """The box of the global tensor that a tensor rank holds; empty if it holds padding only."""
        box = [slice(0, size) for size in self.shape]
        if self.axis is not None:
            assert self.atoms % tensor_size == 0, (self.name, self.atoms, tensor_size)
            held, size = self.axis_size // tensor_size, self.shape[self.axis]
            box[self.axis] = slice(min(tensor_rank * held, size), min((tensor_rank + 1) * held, size))
        return tuple(box)


def default_cuts(tensors: Iterable[GlobalTensor]) -> int:
    """Number of parts to cut sharded axes into: each tensor-parallel size that fits the model divides it.

    Only sizes up to COVERED_TENSOR_SIZE count; `griffin checkpoint reshard` makes chunks for larger ones.
    """
    atoms = math.gcd(*(tensor.atoms for tensor in tensors if tensor.axis is not None))
    return math.lcm(*(size for size in range(1, COVERED_TENSOR_SIZE + 1) if atoms % size == 0))


def chunk_shape(tensor: GlobalTensor, cuts: int, *, whole_bytes: int | None = None) -> tuple[int, ...]:
    """Shape of a tensor's chunks: its axis in `cuts` parts, cut further along dimension 0 to at most CHUNK_BYTES.

    Tensors up to `whole_bytes` (default: WHOLE_BYTES) are one chunk. Bytes are counted in float32, so that all arrays
    of a tensor have the same chunks.
    """
    chunk = list(tensor.shape)
    if tensor.elements * 4 <= (WHOLE_BYTES if whole_bytes is None else whole_bytes):
        return tuple(chunk)
    if tensor.axis is not None:
        assert tensor.axis_size % cuts == 0, (tensor.name, tensor.axis_size, cuts)
        chunk[tensor.axis] = tensor.axis_size // cuts
    rows, most = chunk[0], max(1, CHUNK_BYTES // (4 * math.prod(chunk[1:])))
    parts = -(-rows // most)
    if tensor.axis == 0:  # only equal parts make whole chunks of a tensor rank's rows
        parts = next(count for count in range(parts, rows + 1) if rows % count == 0)
    chunk[0] = -(-rows // parts)
    return tuple(chunk)


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One Zarr array of a checkpoint."""

    kind: str
    tensor: GlobalTensor
    dtype: str  # "float32", "float16" or "bfloat16", which Zarr stores as uint16
    chunks: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.tensor.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        return self.tensor.elements * numpy_dtype(self.dtype).itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each dimension."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True))

    def indices(self) -> Iterator[tuple[int, ...]]:
        """The index of every chunk in the chunk grid, row-major."""
        return itertools.product(*(range(count) for count in self.grid))

    def box(self, index: tuple[int, ...]) -> Box:
        """The part of the array in a chunk."""
        return tuple(
            slice(place * chunk, min((place + 1) * chunk, size))
            for place, chunk, size in zip(index, self.chunks, self.shape, strict=True)
        )

    def file(self, index: tuple[int, ...]) -> str:
        """A chunk's file, relative to the checkpoint's folder."""
        return f"{self.name}/c.{'.'.join(map(str, index))}"

    @property
    def metadata_file(self) -> str:
        return f"{self.name}/zarr.json"

    def to_json(self) -> dict[str, Any]:
        tensor = self.tensor
        return {
            "dtype": self.dtype,
            "shape": list(tensor.shape),
            "chunks": list(self.chunks),
            "axis": tensor.axis,
            "atoms": tensor.atoms,
            "padded": tensor.padded,
        }

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> ArraySpec:
        kind = next(kind for kind in KINDS if name.startswith(f"{kind}."))
        return cls(
            kind=kind,
            tensor=GlobalTensor(
                name=name.removeprefix(f"{kind}."),
                shape=tuple(values["shape"]),
                axis=values["axis"],
                atoms=values["atoms"],
                padded=values["padded"],
            ),
            dtype=values["dtype"],
            chunks=tuple(values["chunks"]),
        )


def state_arrays(tensors: Iterable[GlobalTensor], dtype: str, cuts: int) -> list[ArraySpec]:
    """The arrays of a training's state: the model's weights in `dtype`, the optimizer's state in float32."""
    dtypes = {MODEL: dtype, MASTER: "float32", EXP_AVG: "float32", EXP_AVG_SQ: "float32"}
    if dtype == "float32":  # the model's weights are the optimizer's
        del dtypes[MASTER]
    return [
        ArraySpec(kind=kind, tensor=tensor, dtype=dtypes[kind], chunks=chunk_shape(tensor, cuts))
        for tensor in tensors
        for kind in dtypes
    ]


def shape_of(box: Sequence[slice]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a whole array."""
    return tuple(slice(0, size) for size in shape)


def intersection(a: Box, b: Box) -> Box:
    return tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))


def within(box: Box, outer: Box) -> Box:
    """A box relative to the start of an outer box."""
    return tuple(slice(x.start - y.start, x.stop - y.start) for x, y in zip(box, outer, strict=True))

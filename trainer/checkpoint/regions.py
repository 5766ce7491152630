"""Boxes of row-major tensors as strided regions of flat memory, and copies between such regions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Region:
    """Elements of a flat buffer: `rows` runs of `length` elements, which start at `base` and every `stride` from there.

    Addresses ascend, so that the elements within an address range are consecutive elements of the region.
    """

    base: int
    rows: int
    length: int
    stride: int

    @property
    def count(self) -> int:
        return self.rows * self.length

    @staticmethod
    def box(shape: Sequence[int], box: Sequence[slice]) -> Region:
        """The elements of a box of a row-major tensor, in the row-major order of the box.

        Only the first and the last dimension may be cut, as chunks and shards are; the box spans all others.
        """
        starts, sizes = [part.start for part in box], [part.stop - part.start for part in box]
        if len(shape) == 1:
            return Region(starts[0], 1, sizes[0], sizes[0])
        assert all(size == whole for size, whole in zip(sizes[1:-1], shape[1:-1], strict=True)), (shape, box)
        inner = math.prod(shape[1:])
        base, rows = starts[0] * inner + starts[-1], sizes[0] * math.prod(sizes[1:-1])
        if sizes[-1] == shape[-1]:
            return Region(base, 1, rows * sizes[-1], rows * sizes[-1])
        return Region(base, rows, sizes[-1], shape[-1])

    def before(self, address: int) -> int:
        """The number of elements below an address."""
        if address <= self.base or self.count == 0:
            return 0
        row, column = divmod(address - self.base, self.stride)
        return min(row * self.length + min(column, self.length), self.count)


def take(buffer: np.ndarray, region: Region, first: int, last: int, origin: int = 0) -> np.ndarray:
    """Elements [first, last) of a region of `buffer` [n], whose first element has address `origin`.

    A view if they are contiguous, else a copy.
    """
    if region.rows == 1:
        return buffer[region.base + first - origin : region.base + last - origin]
    values = np.empty(last - first, buffer.dtype)
    for part, place in _parts(buffer, region, first, last, origin):
        values[place : place + part.size].reshape(part.shape)[...] = part
    return values


def put(buffer: np.ndarray, region: Region, first: int, last: int, values: np.ndarray, origin: int = 0) -> None:
    """Write `values` [last - first] to elements [first, last) of a region of `buffer` [n]; the inverse of `take`."""
    for part, place in _parts(buffer, region, first, last, origin):
        part[...] = values[place : place + part.size].reshape(part.shape)


def move(
    source: np.ndarray, inside: Region, target: np.ndarray, local: Region, first: int, last: int, origin: int
) -> None:
    """Copy elements [first, last) of region `inside` of `source` [n] to those of region `local` of `target` [m].

    Both regions have the same size; the first element of `target` has address `origin`.
    """
    for part, place in _parts(source, inside, first, last, 0):
        if local.rows == 1:  # contiguous in the target: no copy in between
            at = local.base + first + place - origin
            target[at : at + part.size].reshape(part.shape)[...] = part
        else:
            put(target, local, first + place, first + place + part.size, part.reshape(-1), origin)


def _parts(buffer: np.ndarray, region: Region, first: int, last: int, origin: int) -> list[tuple[np.ndarray, int]]:
    """Views of `buffer` that make up the elements [first, last), each with its offset among them.

    At most three: the end of a row, whole rows, the beginning of a row.
    """
    length, stride, parts = region.length, region.stride, []
    at = first
    while at < last:
        row, column = divmod(at, length)
        rows = (last - at) // length if column == 0 else 0
        start = region.base + row * stride + column - origin
        if rows > 0:
            window = buffer[start : start + (rows - 1) * stride + length]
            step = window.strides[0]
            part = np.lib.stride_tricks.as_strided(window, (rows, length), (stride * step, step))
        else:
            part = buffer[start : start + min(length - column, last - at)]
        parts.append((part, at - first))
        at += part.size
    return parts

"""A small benchmark of kernels, for tests."""

from __future__ import annotations

import torch

from griffin.tools.bench.kernels import Row, Settings
from griffin.tools.bench.kernels_operations import Clock, Shape, Times

CPU = torch.device("cpu")
SHAPE = Shape(width=5, steps=12, batch=2)
SMALL = Settings(
    widths=(5,),
    lengths=(12,),
    batches=(2,),
    dtype="float32",
    repeats=1,
    chunk=8,
    peers=False,
    copy_bytes=2**16,
)


def small_clock() -> Clock:
    return Clock(CPU, flush_bytes=1024)


def row(operation: str, shape: Shape, over_floor: float) -> Row:
    """Return the row of an operation that takes a multiple of its floor of 1 ms."""
    return Row(operation, shape, "sequential", Times(0.25 * over_floor, 0.75 * over_floor), 10**6, 1e9)

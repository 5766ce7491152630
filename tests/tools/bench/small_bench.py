"""A small benchmark of kernels, for tests."""

from __future__ import annotations

import torch

from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig
from griffin.tools.bench.kernels.rank_operations import RankShape
from griffin.tools.bench.kernels.recurrences import Shape
from griffin.tools.bench.kernels.rows import Row, Times
from griffin.tools.bench.kernels.settings import Settings
from griffin.tools.bench.kernels.timing import Clock

CPU = torch.device("cpu")
SHAPE = Shape(width=5, steps=12, batch=2)
RANK = RankShape(
    name="small",
    model=ModelConfig(
        pattern=(RECURRENT, ATTENTION),
        width=8,
        recurrent_width=12,
        heads=4,
        head_dim=8,
        gate_blocks=4,
        window=5,
        vocabulary=50,
        logit_soft_cap=10.0,
    ),
    tensor=2,
    steps=12,
    batch=2,
)
SMALL = Settings(
    widths=(5,),
    lengths=(12,),
    batches=(2,),
    ranks=(),
    dtype="float32",
    repeats=1,
    chunk=8,
    peers=False,
    copy_bytes=2**16,
    product_size=32,
)


def small_clock() -> Clock:
    return Clock(CPU, flush_bytes=1024)


def row(operation: str, shape: Shape, over_floor: float) -> Row:
    """Return the row of an operation that takes a multiple of its floor of 1 ms."""
    return Row(operation, shape, "sequential", Times(0.25 * over_floor, 0.75 * over_floor), 10**6, 1e9)

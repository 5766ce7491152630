"""What an operation must at least move and compute: what its operators state, counted on meta tensors."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache

import torch

from griffin.tools.bench.count.recorder import Op, Recorder
from griffin.tools.bench.kernels.operations import Operation, Random


@dataclass(frozen=True)
class Counted:
    """Operators of one forward and backward on a GPU, and bytes."""

    ops: tuple[Op, ...]
    inputs: int  # bytes of a set of inputs
    peak: int  # bytes of results and of what is computed on the way, at most at a time

    @property
    def bytes(self) -> float:
        """Moved to and from memory."""
        return sum(op.bytes for op in self.ops)

    @property
    def flops(self) -> float:
        """Of matrix products."""
        return sum(op.flops for op in self.ops)

    def seconds(self, bandwidth: float, products: float) -> float:
        """The least time of all operators, each of which moves bytes and computes products at the same time."""
        return sum(max(op.bytes / bandwidth, op.flops / products) for op in self.ops)


@cache
def counted(operation: Operation, shape: Hashable, dtype: torch.dtype) -> Counted:
    """Run an operation forward and backward on meta tensors, its recurrences in one chunk of time."""
    inputs = operation.make(shape, Random(dtype, torch.device("meta")))
    with Recorder() as recorder:
        outputs = operation.run(inputs.all, "triton", 0)
        grads = inputs.gradients(outputs)
    del outputs, grads
    return Counted(tuple(recorder.ops), inputs.bytes, recorder.memory.peak)

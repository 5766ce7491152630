"""The loss as one pass over chunks of tokens, and its gradient by that of its sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.linear_cross_entropy import ops
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.products import add_product

MOST_BYTES = 2**28  # of logits at a time
# On CPUs products of fewer tokens are slower, since each packs the whole table anew (by a third at 64, by a tenth at
# 128); beyond them, more bytes than these fall out of caches.
CPU_TOKENS, CPU_BYTES = 192, 2**23
ALIGNED = 64  # columns; rows of logits begin at multiples of 128 bytes


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Everything that the loss depends on besides tensors."""

    soft_cap: float
    z_loss: float
    first: int  # the label of the table's first row
    valid: int  # rows that are no padding
    gather: Callable[[Tensor], Tensor] | None
    add_to_table: Callable[[Tensor, Tensor], Tensor | None] | None
    chunk: int | None
    backend: str


def chunk_tokens(rows: int, dtype: torch.dtype, *, on_cpu: bool) -> int:
    """Tokens whose logits over a table of `rows` are there at a time: as many as MOST_BYTES allow on a GPU."""
    row = math.ceil(rows / ALIGNED) * ALIGNED * dtype.itemsize
    # On CPUs products of half precision also need their operands in float32.
    most = MOST_BYTES // (row + on_cpu * (4 if dtype.itemsize == 2 else 0) * rows)
    if on_cpu:
        most = min(most, max(CPU_TOKENS, CPU_BYTES // row))
    return max(1, most - most % 64 if most > 64 else most)


class SummedLoss(Function):
    """hidden [N, D], table [V, D], labels [N], weights [N] -> the weighted sum [], losses [N], and the sum's gradients.

    Only the sum is differentiable. Gradients that are not needed are None.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        table: Tensor,
        labels: Tensor,
        weights: Tensor,
        terms: Terms,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        dtype = accumulation_dtype(hidden)
        weights = weights.to(dtype)
        totals, losses = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        grad_table = None
        if needs[1]:
            grad_table = torch.empty_like(table, dtype=dtype) if len(hidden) else torch.zeros_like(table, dtype=dtype)
        on_cpu = hidden.device.type == "cpu"
        step = min(terms.chunk or chunk_tokens(len(table), hidden.dtype, on_cpu=on_cpu), max(1, len(hidden)))
        buffer = hidden.new_empty(step, math.ceil(len(table) / ALIGNED) * ALIGNED)[:, : len(table)]
        for begin in range(0, len(hidden), step):
            chunk = slice(begin, begin + step)
            x, y, w = hidden[chunk], labels[chunk], weights[chunk]
            logits = torch.mm(x, table.t(), out=buffer[: len(x)])
            found = ops.statistics_(logits, y, terms.soft_cap, terms.first, terms.valid, terms.backend)
            maxima, sums, targets = _combined(found[None] if terms.gather is None else terms.gather(found))
            log_sums = sums.log()
            losses[chunk] = log_sums - (targets - maxima)
            totals[chunk] = losses[chunk]
            scales = w / sums
            if terms.z_loss > 0:
                log_sum_exp = maxima + log_sums
                totals[chunk] += terms.z_loss * log_sum_exp.square()
                scales *= 1 + 2 * terms.z_loss * log_sum_exp
            if grad_hidden is None and grad_table is None:
                continue
            ops.gradient_(logits, y, maxima, scales, w, terms.soft_cap, terms.first, terms.valid, terms.backend)
            if grad_hidden is not None:
                torch.mm(logits, table, out=grad_hidden[chunk])
            if grad_table is not None:
                add_product(grad_table, logits, x, overwrite=begin == 0)
        return (totals * weights).sum(), losses, grad_hidden, grad_table

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.set_materialize_grads(False)  # zeros as large as the table's gradient
        ctx.save_for_backward(*output[2:])
        ctx.add_to_table, ctx.table_dtype = inputs[4].add_to_table, inputs[1].dtype
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        (grad,) = without_tangents(grad)
        grad_hidden, grad_table = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_table is not None:
            if ctx.add_to_table is not None:
                grad_table = ctx.add_to_table(grad_table, grad)
            else:
                grad_table = (grad_table * grad).to(ctx.table_dtype)
        return grad_hidden, grad_table, None, None, None, None


def _combined(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of whole rows of logits from those of their shards, [shards, 3, N]."""
    maxima, sums, targets = found.unbind(1)
    highest = maxima.amax(0)
    return highest, (sums * (maxima - highest).exp()).sum(0), targets.sum(0)

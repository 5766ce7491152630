"""The loss by chunks of tokens: logits are computed once, and the gradient of the sum in the same pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.linear_cross_entropy import ops
from griffin.kernels.linear_cross_entropy.blocks import sum_by_blocks
from griffin.kernels.linear_cross_entropy.terms import ALIGNED, Terms, row_terms
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.products import add_product


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
        step: int,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        dtype = accumulation_dtype(hidden)
        weights = weights.to(dtype)
        step = min(step, max(1, len(hidden)))
        if hidden.device.type == "cpu" and terms.backend == "cpu":
            sums = sum_by_blocks(hidden, table, labels, weights, terms, step, needs)
            return (sums.totals * weights).sum(), sums.losses, sums.grad_hidden, sums.grad_table
        totals, losses = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        grad_table = None
        if needs[1]:
            grad_table = torch.empty_like(table, dtype=dtype) if len(hidden) else torch.zeros_like(table, dtype=dtype)
        buffer = hidden.new_empty(step, math.ceil(len(table) / ALIGNED) * ALIGNED)[:, : len(table)]
        for begin in range(0, len(hidden), step):
            chunk = slice(begin, begin + step)
            x, y, w = hidden[chunk], labels[chunk], weights[chunk]
            logits = torch.mm(x, table.t(), out=buffer[: len(x)])
            found = ops.statistics_(logits, y, terms.soft_cap, terms.first, terms.valid, terms.backend)
            every = found[None] if terms.gather is None else terms.gather(found)
            losses[chunk], totals[chunk], maxima, scales = row_terms(every, w, terms)
            if grad_hidden is None and grad_table is None:
                continue
            ops.gradient_(logits, y, maxima, scales, w, terms.soft_cap, terms.first, terms.valid, terms.backend, False)
            if grad_hidden is not None:
                torch.mm(logits, table, out=grad_hidden[chunk])
            if grad_table is not None:
                add_product(grad_table, logits, x, overwrite=begin == 0)
        return (totals * weights).sum(), losses, grad_hidden, grad_table

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.set_materialize_grads(False)  # zeros as large as the table's gradient
        ctx.save_for_backward(*output[2:])
        ctx.main_grad, ctx.added, ctx.table_dtype = inputs[4].main_grad, inputs[4].added, inputs[1].dtype
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None, None
        (grad,) = without_tangents(grad)
        grad_hidden, grad_table = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_table is not None:
            if ctx.main_grad is not None:
                ctx.main_grad.addcmul_(grad_table, grad)
                grad_table = ctx.added()
            else:
                grad_table = (grad_table * grad).to(ctx.table_dtype)
        return grad_hidden, grad_table, None, None, None, None, None

"""Embedding of tokens, its table sharded over the vocabulary, and the table's gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from griffin.parallel.context import Context
from griffin.parallel.layers.linear import gradient_was_added


class Embedding(VocabParallelEmbedding):
    """megatron-core's embedding, with the gradient of the rows that occur added to `main_grad` in float32.

    The table's other rows are then neither written nor read. Without a `main_grad` autograd gets the gradient.
    """

    def __init__(self, context: Context):
        super().__init__(
            context.model.padded_vocabulary,
            context.model.width,
            init_method=None,
            reduce_scatter_embeddings=context.megatron.sequence_parallel,
            config=context.megatron,
            tp_group=context.grid.tensor_group,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [..., D] of tokens int64 [...]; with sequence parallelism, [T/t, B, D] of [B, T]."""
        if self.reduce_scatter_embeddings:
            tokens = tokens.t()
        rows, is_elsewhere = tokens, None
        if self.tp_group.size() > 1:
            rows = tokens - self.vocab_start_index
            is_elsewhere = (rows < 0) | (rows >= len(self.weight))
            # Rows of other ranks get a gradient of zero. Spread out, they do not contend for one row.
            spread = torch.arange(rows.numel(), device=rows.device).view_as(rows) % len(self.weight)
            rows = torch.where(is_elsewhere, spread, rows)
        x = _Lookup.apply(self.weight, rows, is_elsewhere)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(x, group=self.tp_group)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, rows, is_elsewhere):
        ctx.table = table  # not among saved tensors, whose hooks would lose its `main_grad`
        ctx.save_for_backward(rows, is_elsewhere)
        x = F.embedding(rows, table)
        return x if is_elsewhere is None else x.masked_fill_(is_elsewhere[..., None], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, is_elsewhere = ctx.saved_tensors
        table, main_grad = ctx.table, getattr(ctx.table, "main_grad", None)
        if is_elsewhere is not None:
            grad = grad.masked_fill(is_elsewhere[..., None], 0)
        total = torch.zeros_like(table) if main_grad is None else main_grad
        rows, grad = rows.flatten(), grad.flatten(0, -2).to(total.dtype)
        # Each of them adds in a fixed order on its device: two runs give the same bits.
        if grad.is_cuda:
            total.index_put_((rows,), grad, accumulate=True)
        else:
            total.index_add_(0, rows, grad)
        return (total if main_grad is None else gradient_was_added(table)), None, None

"""The loss by tiles of the table, for vocabularies of which few tokens' logits are held at a time.

Logits are computed twice, since their gradient needs the sum over the whole vocabulary: four products of many tokens
take less time than three of few. The table's gradient is complete for each tile, and is added once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.linear_cross_entropy import ops
from griffin.kernels.linear_cross_entropy.terms import MOST_TOKENS, Terms, combined, row_terms
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.products import add_product


class TiledLoss(Function):
    """hidden [N, D], table [V, D], labels [N], weights [N] -> the weighted sum [] and losses [N].

    Only the sum is differentiable. Its gradients are computed in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, labels: Tensor, weights: Tensor, terms: Terms, rows: int
    ) -> tuple[Tensor, Tensor]:
        weights = weights.to(accumulation_dtype(hidden))
        found = [
            _statistics(hidden[tokens], table, labels[tokens], terms, rows) for tokens in _token_blocks(len(hidden))
        ]
        statistics = torch.cat(found, 1)
        every = statistics[None] if terms.gather is None else terms.gather(statistics)
        losses, totals, maxima, scales = row_terms(every, weights, terms)
        ctx.save_for_backward(hidden, table, labels, weights, maxima, scales)
        ctx.terms, ctx.rows = terms, rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses)
        return (totals * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        (grad,) = without_tangents(grad)
        hidden, table, labels, weights, maxima, scales = ctx.saved_tensors
        terms: Terms = ctx.terms
        needs_hidden, needs_table, *_ = ctx.needs_input_grad
        weights, scales = weights * grad, scales * grad
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        total = None
        if needs_table:
            total = torch.zeros_like(table, dtype=weights.dtype) if terms.main_grad is None else terms.main_grad
        for tokens in _token_blocks(len(hidden)):
            x, y, w, m, s = hidden[tokens], labels[tokens], weights[tokens], maxima[tokens], scales[tokens]
            grad_x = x.new_zeros(x.shape, dtype=weights.dtype) if needs_hidden else None
            for tile, logits in _tiles(x, table, terms, ctx.rows):
                first, valid = terms.first + tile.start, _valid(tile, terms)
                ops.gradient_(logits, y, m, s, w, terms.soft_cap, first, valid, terms.backend, True)
                if grad_x is not None:
                    add_product(grad_x, logits.t(), table[tile], overwrite=tile.start == 0)
                if total is not None:
                    add_product(total[tile], logits, x)
            if grad_hidden is not None and grad_x is not None:
                grad_hidden[tokens] = grad_x
        if total is not None:
            total = total.to(table.dtype) if terms.main_grad is None else terms.added()
        return grad_hidden, total, None, None, None, None


def _token_blocks(tokens: int) -> Iterator[slice]:
    for begin in range(0, max(1, tokens), MOST_TOKENS):
        yield slice(begin, begin + MOST_TOKENS)


def _tiles(x: Tensor, table: Tensor, terms: Terms, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield tiles of the table that are not only padding, at least one, and their logits of x in a buffer."""
    buffer = x.new_empty(len(x) * rows)
    for begin in range(0, max(1, terms.valid), rows):
        tile = slice(begin, min(begin + rows, len(table)))
        size = tile.stop - begin
        yield tile, torch.mm(x, table[tile].t(), out=buffer[: len(x) * size].view(len(x), size))


def _valid(tile: slice, terms: Terms) -> int:
    return min(max(terms.valid - tile.start, 0), tile.stop - tile.start)


def _statistics(x: Tensor, table: Tensor, labels: Tensor, terms: Terms, rows: int) -> Tensor:
    """Return the statistics [3, N] of the logits of x over all tiles."""
    found = None
    for tile, logits in _tiles(x, table, terms, rows):
        first, valid = terms.first + tile.start, _valid(tile, terms)
        part = ops.statistics_(logits, labels, terms.soft_cap, first, valid, terms.backend)
        found = part if found is None else combined(torch.stack((found, part)))
    assert found is not None
    return found

"""The loss on CPUs by chunks of tokens, and within them by blocks of the table whose logits stay in cache.

Of a block's logits only exp(logit - maximum of the block) goes to memory. Gradients are products with it, whose rows
are multiplied by the missing factors of the softmax, less what the labels' own logits add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from griffin.kernels.linear_cross_entropy.terms import Terms, combined, row_terms
from griffin.kernels.memory_layout import accumulation_dtype

LOG2_E = math.log2(math.e)
BLOCK_ELEMENTS = 7 * 2**18  # of a block's rows and logits: 7 MB of float32 in the last level of cache


class Sums(NamedTuple):
    """Losses of all tokens, [N], and gradients of their weighted sum, None if they are not needed."""

    totals: Tensor  # without weights
    losses: Tensor  # without weights and z-loss
    grad_hidden: Tensor | None
    grad_table: Tensor | None


def sum_by_blocks(
    hidden: Tensor, table: Tensor, labels: Tensor, weights: Tensor, terms: Terms, step: int, needs: tuple[bool, bool]
) -> Sums:
    """Compute the loss of hidden [N, D], `step` tokens at a time. All products are in the dtype of the sums."""
    dtype = accumulation_dtype(hidden)
    totals, losses = hidden.new_empty(2, len(hidden), dtype=dtype)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    grad_table = torch.empty_like(table, dtype=dtype) if needs[1] else None
    if grad_table is not None:
        grad_table[terms.valid if len(hidden) else 0 :].zero_()
    blocks = list(_blocks(terms.valid, max(1, BLOCK_ELEMENTS // (step + table.shape[1]))))
    largest = max((block.stop - block.start for block in blocks), default=0)
    logits = hidden.new_empty(step * largest, dtype=dtype)
    products = hidden.new_empty(len(blocks), step * needs[0], hidden.shape[1], dtype=dtype)  # of exponentials and table
    exponentials = hidden.new_empty(step * terms.valid if any(needs) else 0, dtype=dtype)
    for begin in range(0, len(hidden), step):
        chunk = slice(begin, begin + step)
        x, w, places = hidden[chunk].to(dtype), weights[chunk], labels[chunk] - terms.first
        # Of the chunk, block after block, each [tokens, rows].
        kept = [exponentials[len(x) * block.start : len(x) * block.stop] for block in blocks]
        found = [x.new_zeros(3, len(x))]
        found[0][0] = -math.inf
        scaled = x if terms.soft_cap > 0 else x * LOG2_E
        for place, block in enumerate(blocks):
            rows = table[block].to(dtype)
            part = torch.mm(scaled, rows.t(), out=_matrix(logits, len(x), block))
            into = _matrix(kept[place], len(x), block) if any(needs) else None
            found.append(_exponentials(part, places - block.start, terms.soft_cap, into))
            if into is not None and needs[0]:
                torch.mm(into, rows, out=products[place, : len(x)])  # while both are in cache
        statistics = torch.stack(found)
        whole = combined(statistics)
        every = whole[None] if terms.gather is None else terms.gather(whole)
        losses[chunk], totals[chunk], maxima, scales = row_terms(every, w, terms)
        if not any(needs):
            continue
        factors = scales * (statistics[1:, 0] - maxima).exp()  # [blocks, tokens]
        if grad_table is not None:
            for place, block in enumerate(blocks):
                part, weighted = _matrix(kept[place], len(x), block), x * factors[place, :, None]
                if begin == 0:
                    torch.mm(part.t(), weighted, out=grad_table[block])
                else:
                    torch.addmm(grad_table[block], part.t(), weighted, out=grad_table[block])
        # What the labels' own logits add to the gradients of their tokens and rows is subtracted.
        is_here = (places >= 0) & (places < terms.valid)
        slopes = w * (1 - (whole[2] / terms.soft_cap).square()) if terms.soft_cap > 0 else w
        slopes = torch.where(is_here, slopes, 0)[:, None]
        rows = torch.where(is_here, places, 0)
        if grad_hidden is not None:
            grad_x = table[rows].to(dtype).mul_(slopes).neg_()
            for factor, product in zip(factors, products, strict=True):
                grad_x.addcmul_(product[: len(x)], factor[:, None])
            grad_hidden[chunk] = grad_x
        if grad_table is not None:
            grad_table.index_add_(0, rows, x * slopes, alpha=-1)
    return Sums(totals, losses, grad_hidden, grad_table)


def _blocks(rows: int, size: int) -> Iterator[slice]:
    for begin in range(0, rows, size):
        yield slice(begin, min(begin + size, rows))


def _matrix(buffer: Tensor, tokens: int, block: slice) -> Tensor:
    size = block.stop - block.start
    return buffer[: tokens * size].view(tokens, size)


def _exponentials(logits: Tensor, places: Tensor, soft_cap: float, into: Tensor | None) -> Tensor:
    """Return the statistics [3, N] of a block's logits, which are overwritten; see `ops.statistics_`.

    exp(logit - maximum), times the derivative of the soft cap, is stored in `into`. `places` are the labels' columns.
    Without a soft cap logits are given in units of log 2: exp2 takes a quarter of the time of exp.
    """
    if soft_cap > 0:
        ratios = logits.div_(soft_cap).tanh_()
        logits = ratios * (soft_cap * LOG2_E)
    is_here = (places >= 0) & (places < logits.shape[1])
    targets = logits.gather(1, places.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    maxima = logits.amax(1)
    exponentials = torch.exp2(logits.sub_(maxima[:, None]), out=logits if into is None else into)
    sums = exponentials.sum(1)
    if soft_cap > 0 and into is not None:
        into.mul_(ratios.square_().neg_().add_(1))
    return torch.stack((maxima / LOG2_E, sums, torch.where(is_here, targets / LOG2_E, 0)))

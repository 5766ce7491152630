"""What both schedules of the loss share: its parameters, sizes of chunks, and the terms of a token's loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MOST_BYTES = 2**28  # of logits at a time
# On CPUs products of fewer tokens are slower, since each packs the whole table anew (by a tenth at 64); beyond them,
# more bytes than these fall out of caches.
CPU_TOKENS, CPU_BYTES = 192, 2**23
ALIGNED = 64  # columns; rows of logits begin at multiples of 128 bytes
# With fewer tokens at a time, reading and writing the table's float32 gradient takes a GPU longer than the product that
# is added to it: 8 bytes for 2 FLOPs a token, at 3 TB/s and 800 TFLOP/s.
FEW_TOKENS = 1024
MOST_TOKENS = 2**14  # of a tile of the table, whose rows would be too few for efficient products with more


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Parameters of `griffin.kernels.linear_cross_entropy.linear_cross_entropy`."""

    soft_cap: float
    z_loss: float
    first: int  # the label of the table's first row
    valid: int  # rows that are not padding
    gather: Callable[[Tensor], Tensor] | None
    main_grad: Tensor | None
    added: Callable[[], Tensor | None]
    backend: str


def chunk_tokens(rows: int, dtype: torch.dtype, *, on_cpu: bool) -> int:
    """Return the tokens whose logits over a table of `rows` are held at a time: on GPUs as many as MOST_BYTES allow.

    On CPUs logits are in the dtype of the sums.
    """
    row = math.ceil(rows / ALIGNED) * ALIGNED * (max(dtype.itemsize, 4) if on_cpu else dtype.itemsize)
    most = MOST_BYTES // row
    if on_cpu:
        most = min(most, max(CPU_TOKENS, CPU_BYTES // row))
    return max(1, most - most % 64 if most > 64 else most)


def tile_rows(tokens: int, rows: int, dtype: torch.dtype) -> int:
    """Return the rows of the table whose logits for `tokens` are held at a time: as many as MOST_BYTES allow."""
    most = MOST_BYTES // (dtype.itemsize * max(1, min(tokens, MOST_TOKENS)))
    return min(rows, most - most % ALIGNED)


class RowTerms(NamedTuple):
    """Terms of the losses of N tokens, each [N]."""

    losses: Tensor  # without weights and z-loss
    totals: Tensor  # without weights
    maxima: Tensor  # of the logits
    scales: Tensor  # of exp(logit - maximum) in the gradient of the sum


def row_terms(found: Tensor, weights: Tensor, terms: Terms) -> RowTerms:
    """Return the terms of tokens from the statistics of each shard's logits, [shards, 3, N]."""
    maxima, sums, targets = combined(found)
    log_sums = sums.log()
    losses = log_sums - (targets - maxima)
    scales = weights / sums
    if terms.z_loss <= 0:
        return RowTerms(losses, losses, maxima, scales)
    log_sum_exp = maxima + log_sums
    totals = losses + terms.z_loss * log_sum_exp.square()
    return RowTerms(losses, totals, maxima, scales.mul_(1 + 2 * terms.z_loss * log_sum_exp))


def combined(found: Tensor) -> Tensor:
    """Return statistics of whole rows of logits, [3, N], from those of their parts, [parts, 3, N]."""
    if len(found) == 1:
        return found[0]
    maxima, sums, targets = found.unbind(1)
    highest = maxima.amax(0)
    return torch.stack((highest, (sums * (maxima - highest).exp()).sum(0), targets.sum(0)))

"""Operations of the loss on a chunk of logits in PyTorch, in tiles of rows that stay in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype

LOG2_E = math.log2(math.e)
TILE_ELEMENTS = 2**19  # of a float32 buffer; 1 MB of each of two cores
DEVICE_TILE_ELEMENTS = 2**24  # no such cache elsewhere (CUDA): the tile only bounds memory


def _tiles(logits: Tensor) -> Iterator[slice]:
    elements = TILE_ELEMENTS if logits.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    rows = max(1, elements // logits.shape[1])
    for first in range(0, len(logits), rows):
        yield slice(first, min(first + rows, len(logits)))


def _places(labels: Tensor, first: int, valid: int) -> tuple[Tensor, Tensor]:
    """Return the columns [N, 1] of the labels, clamped to existing ones, and which labels are among them."""
    places = (labels - first)[:, None]
    return places.clamp(0, valid - 1), (places >= 0) & (places < valid)


def statistics_(logits: Tensor, labels: Tensor, soft_cap: float, first: int, valid: int) -> Tensor:
    """Compute `griffin.kernels.linear_cross_entropy.ops.statistics_`, for any device, optimised for CPUs.

    Leaves soft-capped logits in float32 and float64; half precision would round them.
    """
    dtype = accumulation_dtype(logits)
    found = logits.new_zeros((3, len(logits)), dtype=dtype)
    if valid == 0:
        found[0] = -math.inf
        return found
    maxima, sums, targets = found
    places, are_there = _places(labels, first, valid)
    buffer = _buffer(logits, valid)
    for rows in _tiles(logits):
        wide = _soft_cap_(logits[rows, :valid].to(dtype), soft_cap)
        torch.amax(wide, 1, out=maxima[rows])
        torch.gather(wide, 1, places[rows], out=targets[rows, None])
        torch.sum(_exponentials(wide, maxima[rows], buffer), 1, out=sums[rows])
    found[2] = torch.where(are_there[:, 0], targets, 0)
    return found


def gradient_(
    logits: Tensor,
    labels: Tensor,
    maxima: Tensor,
    scales: Tensor,
    weights: Tensor,
    soft_cap: float,
    first: int,
    valid: int,
    is_raw: bool,
) -> None:
    """Compute `griffin.kernels.linear_cross_entropy.ops.gradient_`, for any device, optimised for CPUs."""
    dtype = accumulation_dtype(logits)
    logits[:, valid:] = 0
    if valid == 0:
        return
    places, are_there = _places(labels, first, valid)
    at_target = torch.where(are_there, -weights[:, None], 0)
    buffer = _buffer(logits, valid)
    for rows in _tiles(logits):
        part = logits[rows, :valid]
        wide = part if part.dtype == dtype and not is_raw else _soft_cap_(part.to(dtype), soft_cap)
        out = _exponentials(wide, maxima[rows], buffer if soft_cap > 0 else wide).mul_(scales[rows, None])
        out.scatter_add_(1, places[rows], at_target[rows])
        if soft_cap > 0:
            out = wide.div_(soft_cap).square_().neg_().add_(1).mul_(out)
        if out.dtype != part.dtype:
            part.copy_(out)


def _buffer(logits: Tensor, valid: int) -> Tensor:
    """Return a buffer for a tile."""
    rows = next(_tiles(logits), slice(0, 0)).stop
    return logits.new_empty(rows, valid, dtype=accumulation_dtype(logits))


def _exponentials(logits: Tensor, maxima: Tensor, buffer: Tensor) -> Tensor:
    """Compute exp(logit - maximum) in the buffer, which may be the logits; exp2 takes a quarter of exp's time."""
    shifted = torch.sub(logits, maxima[:, None], out=buffer[: len(logits)])
    return shifted.mul_(LOG2_E).exp2_()


def _soft_cap_(logits: Tensor, soft_cap: float) -> Tensor:
    return logits.div_(soft_cap).tanh_().mul_(soft_cap) if soft_cap > 0 else logits

"""What the loss does with a chunk of logits as PyTorch operations, in tiles of rows that stay in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from griffin.kernels.layout import accumulation_dtype

TILE_ELEMENTS = 2**19  # of a float32 buffer; 1 MB of each of two cores
DEVICE_TILE_ELEMENTS = 2**24  # no such cache elsewhere (CUDA): the tile only bounds memory


def _tiles(logits: Tensor) -> Iterator[slice]:
    elements = TILE_ELEMENTS if logits.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    rows = max(1, elements // logits.shape[1])
    for first in range(0, len(logits), rows):
        yield slice(first, min(first + rows, len(logits)))


def _places(labels: Tensor, first: int, valid: int) -> tuple[Tensor, Tensor]:
    """Columns [N, 1] of the labels, clamped to those there are, and which of the labels are among them."""
    places = (labels - first)[:, None]
    return places.clamp(0, valid - 1), (places >= 0) & (places < valid)


def statistics_(logits: Tensor, labels: Tensor, soft_cap: float, first: int, valid: int) -> Tensor:
    """As `griffin.kernels.linear_cross_entropy.ops.statistics_`; any device, made for CPUs.

    Leaves exp(logit - maximum) in float32 and float64, which spares the gradient the dearest operation; half precision
    would round it.
    """
    dtype = accumulation_dtype(logits)
    found = logits.new_zeros((3, len(logits)), dtype=dtype)
    if valid == 0:
        found[0] = -math.inf
        return found
    maxima, sums, targets = found
    places, are_there = _places(labels, first, valid)
    for rows in _tiles(logits):
        wide = _capped_(logits[rows, :valid].to(dtype), soft_cap)
        torch.amax(wide, 1, out=maxima[rows])
        torch.gather(wide, 1, places[rows], out=targets[rows, None])
        torch.sum(wide.sub_(maxima[rows, None]).exp_(), 1, out=sums[rows])
    found[2] = torch.where(are_there[:, 0], targets, 0)
    return found


def gradient_(
    logits: Tensor,
    labels: Tensor,
    own_maxima: Tensor,
    maxima: Tensor,
    scales: Tensor,
    weights: Tensor,
    soft_cap: float,
    first: int,
    valid: int,
) -> None:
    """As `griffin.kernels.linear_cross_entropy.ops.gradient_`; any device, made for CPUs."""
    dtype = accumulation_dtype(logits)
    logits[:, valid:] = 0
    if valid == 0:
        return
    places, are_there = _places(labels, first, valid)
    at_target = -weights[:, None] * are_there
    factors = (scales * (own_maxima - maxima).exp())[:, None]
    tiny = torch.finfo(dtype).tiny
    for rows in _tiles(logits):
        part = logits[rows, :valid]
        wide, slope = part, None
        if part.dtype != dtype:
            wide = _capped_(part.to(dtype), soft_cap)
            if soft_cap > 0:
                slope = wide / soft_cap
            wide.sub_(own_maxima[rows, None]).exp_()
        elif soft_cap > 0:  # the logit is maximum + log of what is there, and of no account where that is 0
            slope = wide.clamp(min=tiny).log_().add_(own_maxima[rows, None]).div_(soft_cap)
        wide.mul_(factors[rows])
        wide.scatter_add_(1, places[rows], at_target[rows])
        if slope is not None:
            wide.mul_(slope.square_().neg_().add_(1))
        if wide is not part:
            part.copy_(wide)


def _capped_(logits: Tensor, soft_cap: float) -> Tensor:
    return logits.div_(soft_cap).tanh_().mul_(soft_cap) if soft_cap > 0 else logits

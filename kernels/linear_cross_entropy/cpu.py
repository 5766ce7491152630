"""What the loss does with a chunk of logits as PyTorch operations, in tiles of rows that stay in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from griffin.kernels.layout import accumulation_dtype
from griffin.kernels.linear_cross_entropy.reference import soft_capped

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


def statistics(logits: Tensor, labels: Tensor, soft_cap: float, first: int, valid: int) -> Tensor:
    """As `griffin.kernels.linear_cross_entropy.ops.statistics`; any device, made for CPUs."""
    dtype = accumulation_dtype(logits)
    found = logits.new_zeros((3, len(logits)), dtype=dtype)
    if valid == 0:
        found[0] = -math.inf
        return found
    maxima, sums, targets = found
    places, are_there = _places(labels, first, valid)
    for rows in _tiles(logits):
        part = soft_capped(logits[rows, :valid].to(dtype), soft_cap)
        torch.amax(part, 1, out=maxima[rows])
        targets[rows] = torch.where(are_there[rows], part.gather(1, places[rows]), 0)[:, 0]
        torch.sum((part - maxima[rows, None]).exp_(), 1, out=sums[rows])
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
) -> None:
    """As `griffin.kernels.linear_cross_entropy.ops.gradient_`; any device, made for CPUs."""
    dtype = accumulation_dtype(logits)
    logits[:, valid:] = 0
    if valid == 0:
        return
    places, are_there = _places(labels, first, valid)
    at_target = torch.where(are_there, -weights[:, None], 0)
    for rows in _tiles(logits):
        part = logits[rows, :valid]
        wide = part.to(dtype)  # part itself in float32
        slope = None
        if soft_cap > 0:
            wide.div_(soft_cap).tanh_()
            slope = 1 - wide.square()
            wide.mul_(soft_cap)
        wide.sub_(maxima[rows, None]).exp_().mul_(scales[rows, None])
        wide.scatter_add_(1, places[rows], at_target[rows])
        if slope is not None:
            wide.mul_(slope)
        if wide.data_ptr() != part.data_ptr():
            part.copy_(wide)

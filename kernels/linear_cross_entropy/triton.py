"""Operations of the loss on a chunk of logits with Triton programs."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.linear_cross_entropy import programs
from griffin.kernels.triton_launch import launch

# A thread has two groups of eight columns of a block: loads of 16 bytes in half precision.
BLOCK, LANE, WARPS, STAGES = 4096, 8, 8, 3
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4


def statistics_(logits: Tensor, labels: Tensor, soft_cap: float, first: int, valid: int) -> Tensor:
    """Compute `griffin.kernels.linear_cross_entropy.ops.statistics_`; logits stay as they are."""
    found = logits.new_empty((3, len(logits)), dtype=torch.float32)
    maxima, sums, targets = found
    arguments = {
        "logits": logits,
        "labels": labels.contiguous(),
        "maxima": maxima,
        "sums": sums,
        "targets": targets,
        "columns": logits.shape[1],
        "row_stride": logits.stride(0),
        "valid": valid,
        "first": first,
        "soft_cap": soft_cap,
        "inverse_cap": 1 / soft_cap if soft_cap > 0 else 0.0,
        "HAS_CAP": soft_cap > 0,
        "LANE": LANE,
        "STAGES": STAGES,
    }
    if len(logits):
        launch(programs.statistics, 1, arguments, logits[None, :, :1], block=BLOCK, warps=WARPS)
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
    """Compute `griffin.kernels.linear_cross_entropy.ops.gradient_`."""
    arguments = {
        "logits": logits,
        "labels": labels.contiguous(),
        "maxima": maxima.contiguous(),
        "scales": scales.contiguous(),
        "weights": weights.contiguous(),
        "columns": logits.shape[1],
        "row_stride": logits.stride(0),
        "valid": valid,
        "first": first,
        "soft_cap": soft_cap,
        "inverse_cap": 1 / soft_cap if soft_cap > 0 else 0.0,
        "HAS_CAP": soft_cap > 0,
    }
    if len(logits):
        launch(programs.gradient, 1, arguments, logits[None], block=GRADIENT_BLOCK, warps=GRADIENT_WARPS)

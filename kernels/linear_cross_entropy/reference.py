"""Reference loss: all logits at once, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype


def soft_capped(logits: Tensor, soft_cap: float) -> Tensor:
    """Return c tanh(logits / c) for a soft cap c above 0, and the logits themselves for 0."""
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap > 0 else logits


def linear_cross_entropy_reference(
    hidden: Tensor, table: Tensor, labels: Tensor, weights: Tensor, soft_cap: float, z_loss: float, valid: int
) -> tuple[Tensor, Tensor]:
    """Compute `griffin.kernels.linear_cross_entropy.linear_cross_entropy`, for all rows of the vocabulary."""
    dtype = accumulation_dtype(hidden)
    logits = soft_capped(hidden.to(dtype) @ table[:valid].to(dtype).t(), soft_cap)
    log_sum_exp = logits.logsumexp(-1)
    is_there = (labels >= 0) & (labels < valid)
    target = logits.gather(-1, labels.clamp(0, valid - 1).unsqueeze(-1)).squeeze(-1)
    losses = log_sum_exp - torch.where(is_there, target, 0)
    total = (weights.to(dtype) * (losses + z_loss * log_sum_exp.square())).sum()
    return total, losses.detach()

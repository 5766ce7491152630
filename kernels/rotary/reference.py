"""Rotary position embedding (arXiv 2104.09864) on half of each head: angles, and the definition of turning by them."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0


def rotary_cos_sin(positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles by which heads at these positions turn: [..., hd / 4] for positions [...].

    Plane j of the n = hd / 2 dims that turn has the angle positions * 10000^(-2 j / n), in radians.
    """
    rotated = head_dim // 2
    exponents = torch.arange(0, rotated, 2, device=positions.device, dtype=dtype) / rotated
    angles = positions.to(dtype).unsqueeze(-1) * BASE**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Heads x [..., H, hd] turned by angles [..., hd / 4] that they share.

    Dim j and dim j + hd / 4 form a plane (the "rotate half" layout of the first hd / 2 dims); the other dims pass.
    """
    cos, sin = (part.unsqueeze(-2) for part in rotation)
    quarter = cos.shape[-1]
    first, second, rest = x.split((quarter, quarter, x.shape[-1] - 2 * quarter), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in turned), rest), dim=-1)


def rotary_reference(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, B, H, hd], k and v [T, B, hd] of qkv [T, B, (H + 2) hd], differentiated by autograd."""
    q, k, v = qkv.unflatten(-1, (heads + 2, -1)).split((heads, 1, 1), dim=2)
    return apply_rotary(q, (cos, sin)), apply_rotary(k, (cos, sin)).squeeze(2), v.squeeze(2)

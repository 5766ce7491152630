"""Rotary position embedding (arXiv 2104.09864) on half of each head."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate the first half of each head's dims by angles that grow with the token's position in its document.

    Of the n = hd / 2 rotated dims, dims j and j + n / 2 form a plane (the "rotate half" layout) that is rotated by
    positions * 10000^(-2 j / n) radians. The other hd / 2 dims are unchanged. Arithmetic is float32, or float64 if x
    is.

    Args:
        x: [T, B, H, hd] or [T, B, hd], floating point, hd a multiple of 4.
        positions: [T, B] integers.

    Returns:
        The rotated x, of the same shape and dtype.

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    if x.ndim not in (3, 4) or x.shape[-1] % 4 != 0 or not x.dtype.is_floating_point:
        raise ValueError(
            f"x: shape {list(x.shape)}, {x.dtype}; accepted: floating point [T, B, H, hd] or [T, B, hd], hd % 4 == 0"
        )
    if positions.shape != x.shape[:2] or positions.dtype.is_floating_point or positions.dtype == torch.bool:
        raise ValueError(
            f"positions: shape {list(positions.shape)}, {positions.dtype}; accepted: integers {list(x.shape[:2])}"
        )
    if positions.device != x.device:
        raise ValueError(f"positions: on {positions.device}; x is on {x.device}")
    cos_sin = rotary_cos_sin(positions, x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32)
    return apply_rotary(x, cos_sin) if x.ndim == 4 else apply_rotary(x.unsqueeze(2), cos_sin).squeeze(2)


def rotary_cos_sin(positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of the rotation angles at positions [...], each [..., hd / 4]."""
    rotated = head_dim // 2
    exponents = torch.arange(0, rotated, 2, device=positions.device, dtype=dtype) / rotated
    angles = positions.to(dtype).unsqueeze(-1) * BASE**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads x [..., H, hd] by angles that they share, as cosine and sine [..., hd / 4]; see `rotary`."""
    cos, sin = (part.unsqueeze(-2) for part in cos_sin)
    quarter = cos.shape[-1]
    first, second, rest = x.split((quarter, quarter, x.shape[-1] - 2 * quarter), dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in rotated), rest), dim=-1)

"""Rotary position embedding (arXiv 2104.09864) on half of each head."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate the first half of each head's dims by angles that grow with the token's position in its document.

    Of the n = hd / 2 rotated dims, dim j and dim j + n / 2 form a plane (the "rotate half" layout) that turns by
    positions * 10000^(-2 j / n) radians; the other hd / 2 dims pass. Arithmetic is float32, or float64 where x is.

    Args:
        x: [T, B, H, hd] or [T, B, hd], floating point, hd a multiple of 4.
        positions: [T, B] integers.

    Returns:
        The rotated x, with its shape and dtype.

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
    angles = rotation(positions, x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32)
    return turn(x, angles) if x.ndim == 4 else turn(x.unsqueeze(2), angles).squeeze(2)


def rotation(positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles by which heads at these positions turn: [..., hd / 4] for positions [...]."""
    rotated = head_dim // 2
    exponents = torch.arange(0, rotated, 2, device=positions.device, dtype=dtype) / rotated
    angles = positions.to(dtype).unsqueeze(-1) * BASE**-exponents
    return angles.cos(), angles.sin()


def turn(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Heads x [..., H, hd] turned by angles [..., hd / 4] that they share; see `rotary`."""
    cos, sin = (part.unsqueeze(-2) for part in rotation)
    quarter = cos.shape[-1]
    first, second, rest = x.split((quarter, quarter, x.shape[-1] - 2 * quarter), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in turned), rest), dim=-1)

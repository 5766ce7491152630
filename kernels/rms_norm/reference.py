"""RMSNorm of a sum: the definition that every faster path is tested against."""

from __future__ import annotations

from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype


def rms_norm_reference(x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The sum x + branch, rounded, and it normalised; [N, D]. Arithmetic is float32, or float64 where x is."""
    dtype = accumulation_dtype(x)
    total = x if branch is None else (x.to(dtype) + branch.to(dtype)).to(x.dtype)
    wide = total.to(dtype)
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return total, (wide * scale * (1 + weight.to(dtype))).to(x.dtype)

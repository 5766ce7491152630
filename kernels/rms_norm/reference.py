"""Reference RMSNorm of a sum, which the other backends are tested against."""

from __future__ import annotations

from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype


def rms_norm_reference(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return the sum x + (branch + bias), rounded, and its norm; [N, D]. Arithmetic is float32, or float64 if x is."""
    dtype = accumulation_dtype(x)
    total = x
    if branch is not None:
        added = branch.to(dtype) if bias is None else branch.to(dtype) + bias.to(dtype)
        total = (x.to(dtype) + added).to(x.dtype)
    wide = total.to(dtype)
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return total, (wide * scale * (1 + weight.to(dtype))).to(x.dtype)

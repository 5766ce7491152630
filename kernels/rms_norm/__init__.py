"""RMSNorm, of a tensor or of the residual stream with a branch added to it."""

from __future__ import annotations

from torch import Tensor

from griffin.kernels.arguments import FLOATING, check_argument, check_floating
from griffin.kernels.backends import AUTO
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.rms_norm import ops
from griffin.kernels.rms_norm.reference import rms_norm_reference
from griffin.kernels.selection import resolve_backend

__all__ = ["add_rms_norm", "rms_norm"]

EPSILON = 1e-6
TRITON_WIDTH = 8192  # the most of a row, which its programs hold in registers


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float = EPSILON, backend: str = AUTO) -> Tensor:
    """`x * rsqrt(mean(x^2) + epsilon) * (1 + weight)` over the last axis.

    Arithmetic is float32, or float64 where x is; y is rounded once. The backward keeps x and a number for each row. The
    same inputs give the same bits.

    Args:
        x: [..., D], floating point, of any strides. Where rows are evenly spaced and channels adjoin, none is copied.
        weight: [D], floating point.
        backend: "reference" (differentiated by autograd), "cpu", "triton" (D up to 8,192), or "auto" for what
            `griffin.kernels.selection.select_backend` says.

    Returns:
        y [..., D], contiguous, in x's dtype.

    Raises:
        NotImplementedError: forward-mode differentiation by another backend than "reference".
        ValueError: an argument's shape, dtype or device does not fit x, or the backend is unknown or cannot run.
    """
    return _norm(x, None, weight, epsilon, backend)[1]


def add_rms_norm(
    x: Tensor, branch: Tensor, weight: Tensor, *, epsilon: float = EPSILON, backend: str = AUTO
) -> tuple[Tensor, Tensor]:
    """`x + branch`, rounded to x's dtype, and `rms_norm` of that.

    Backward, the gradient that reaches the sum from elsewhere is added in the same program. Only the sum is kept.

    Args:
        branch: shape and dtype of x; the others are `rms_norm`'s.
    """
    check_argument("branch", branch, x.shape, (x.dtype,), "x", x)
    return _norm(x, branch, weight, epsilon, backend)


def _norm(x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, backend: str) -> tuple[Tensor, Tensor]:
    check_floating("x", x)
    if x.ndim < 1 or not x.shape[-1]:
        raise ValueError(f"x: shape {list(x.shape)}; accepted: [..., D]")
    check_argument("weight", weight, x.shape[-1:], FLOATING, "x", x)
    if backend == AUTO and x.shape[-1] > TRITON_WIDTH:
        backend = "cpu"
    backend = resolve_backend(backend, x.device, x.dtype)
    if backend == "triton" and x.shape[-1] > TRITON_WIDTH:
        raise ValueError(f"x: rows of {x.shape[-1]}; backend 'triton' has up to {TRITON_WIDTH}, the others any number")
    if backend == "reference":
        return rms_norm_reference(x, branch, weight, epsilon)
    shape = x.shape
    x, branch, weight = without_tangents(_rows(x), None if branch is None else _rows(branch), weight)
    y, total, _ = ops.forward(x, branch, weight, epsilon, backend)
    return (x if branch is None else total).view(shape), y.view(shape)


def _rows(x: Tensor) -> Tensor:
    """[N, D] of x [..., D], channels adjoining."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()

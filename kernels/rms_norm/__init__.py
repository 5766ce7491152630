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
    """Return `x * rsqrt(mean(x^2) + epsilon) * (1 + weight)` over the last axis.

    Arithmetic is float32, or float64 if x is; y is rounded once. The backward keeps x and a number for each row.
    Results are bitwise reproducible.

    Args:
        x: [..., D], floating point, with any strides. Evenly spaced rows with contiguous channels are not copied.
        weight: [D], floating point.
        backend: "reference" (differentiated by autograd), "cpu", "triton" (D up to 8,192), or "auto", which
            selects by `griffin.kernels.selection.select_backend`.

    Returns:
        y [..., D], contiguous, in x's dtype.

    Raises:
        NotImplementedError: forward-mode differentiation with a backend other than "reference".
        ValueError: the shape, dtype or device of an argument does not match x, or the backend is unknown or cannot run.
    """
    return _norm(x, None, None, weight, epsilon, backend)[1]


def add_rms_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = EPSILON,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Return the sum `x + (branch + bias)`, rounded once to x's dtype, and `rms_norm` of it.

    The backward adds the gradient that reaches the sum from elsewhere in the same program. Only the sum is kept.

    Args:
        branch: shape and dtype of x. The other arguments are those of `rms_norm`.
        bias: [D], floating point.
    """
    check_argument("branch", branch, x.shape, (x.dtype,), "x", x)
    check_argument("bias", bias, x.shape[-1:], FLOATING, "x", x)
    return _norm(x, branch, bias, weight, epsilon, backend)


def _norm(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, weight: Tensor, epsilon: float, backend: str
) -> tuple[Tensor, Tensor]:
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
        return rms_norm_reference(x, branch, bias, weight, epsilon)
    shape = x.shape
    x, branch, bias, weight = without_tangents(_rows(x), None if branch is None else _rows(branch), bias, weight)
    y, total, _ = ops.forward(x, branch, bias, weight, epsilon, backend)
    return (x if branch is None else total).view(shape), y.view(shape)


def _rows(x: Tensor) -> Tensor:
    """Return x [..., D] as [N, D] with contiguous channels."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()

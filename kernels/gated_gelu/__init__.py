"""The gated GeLU of the MLP, with the biases of its two products."""

from __future__ import annotations

from torch import Tensor

from griffin.kernels.arguments import FLOATING, check_argument, check_floating
from griffin.kernels.backends import AUTO
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.gated_gelu import ops
from griffin.kernels.gated_gelu.reference import gated_gelu_reference
from griffin.kernels.selection import resolve_backend

__all__ = ["gated_gelu"]


def gated_gelu(x: Tensor, bias: Tensor, *, backend: str = AUTO) -> Tensor:
    """Compute the GeLU of the gate times the other branch (arXiv 2402.19427, section 2.1).

        y = gelu_tanh(x[..., :F] + bias[:F]) * (x[..., F:] + bias[F:])

    Arithmetic is float32, or float64 if x is; y is rounded once. The backward keeps only x and bias, and returns the
    gradient of x as one tensor. Results are bitwise reproducible.

    Args:
        x: [..., 2 F], floating point, with any strides: the product of a fused linear without its bias. Nothing is
            copied if rows are evenly spaced and channels contiguous.
        bias: [2 F], floating point.
        backend: "reference" (differentiated by autograd), "cpu", "triton", or "auto", which selects by
            `griffin.kernels.selection.select_backend`.

    Returns:
        y [..., F], contiguous, in x's dtype.

    Raises:
        NotImplementedError: forward-mode differentiation with a backend other than "reference".
        ValueError: the shape, dtype or device of an argument does not match x, or the backend is unknown or cannot run.
    """
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] % 2 or not x.shape[-1]:
        raise ValueError(f"x: shape {list(x.shape)}; accepted: [..., 2 F]")
    check_argument("bias", bias, x.shape[-1:], FLOATING, "x", x)
    backend = resolve_backend(backend, x.device, x.dtype)
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    if backend == "reference":
        y = gated_gelu_reference(x, bias)
    else:
        x, bias = without_tangents(x if x.stride(1) == 1 else x.contiguous(), bias)
        y = ops.forward(x, bias, backend)
    return y.view(*shape[:-1], shape[-1] // 2)

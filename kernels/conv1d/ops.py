"""The causal convolution as custom operators, opaque to autograd, activation recomputation and torch.compile."""

# No `from __future__ import annotations`: operator schemas are inferred from the annotations.

import torch
from torch import Tensor

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.memory_layout import accumulation_dtype, dense_like
from griffin.kernels.selection import implementation


@torch.library.custom_op("griffin::causal_conv1d", mutates_args=())
def forward(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, window: Tensor | None, backend: str
) -> Tensor:
    """Return y [T, B, R] of x [T, B, R], weight [K, R], bias [R], starts [T, B] and window [K - 1, B, R]."""
    return implementation("conv1d", backend).forward(x, weight, bias, starts, window)


@forward.register_fake
def _(x, weight, bias, starts, window, backend):
    return dense_like(x)


@torch.library.custom_op("griffin::causal_conv1d_backward", mutates_args=("grad_x",))
def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    starts: Tensor | None,
    window: Tensor | None,
    grad_x: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of weight, bias and window (empty without one) in float32, or float64 if x is.

    The gradient of x is written to `grad_x`, which has the shape and dtype of x and any strides.
    """
    *grads, grad_window = implementation("conv1d", backend).backward(grad_y, x, weight, starts, window, grad_x)
    return (*grads, x.new_empty(0) if grad_window is None else grad_window)


@backward.register_fake
def _(grad_y, x, weight, starts, window, grad_x, backend):
    dtype = accumulation_dtype(x)
    grad_window = x.new_empty(0) if window is None else x.new_empty(window.shape, dtype=dtype)
    return x.new_empty(weight.shape, dtype=dtype), x.new_empty(x.shape[2], dtype=dtype), grad_window


@states_cost(forward)
def _(given, results) -> OperatorCost:
    return OperatorCost(kind="convolution", bytes=touched(given) + touched([results[0]]), kernels=1)


@states_cost(backward)
def _(given, results) -> OperatorCost:
    """One program for the input, and one with a sum over its partial sums for the weight and bias."""
    return OperatorCost(kind="convolution", bytes=touched(given) + touched(results), kernels=3)


def _save(ctx, inputs, output):
    x, weight, bias, starts, window, backend = inputs
    ctx.save_for_backward(x, weight, starts, window)
    ctx.bias_dtype, ctx.backend = bias.dtype, backend


def _backward(ctx, grad_y):
    x, weight, starts, window = ctx.saved_tensors
    (grad_y,) = without_tangents(grad_y)
    grad_x = dense_like(x)
    grad_weight, grad_bias, grad_window = backward(grad_y, x, weight, starts, window, grad_x, ctx.backend)
    return (
        grad_x,
        grad_weight.to(weight.dtype),
        grad_bias.to(ctx.bias_dtype),
        None,
        None if window is None else grad_window.to(window.dtype),
        None,
    )


forward.register_autograd(_backward, setup_context=_save)

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
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor | None,
    window: Tensor | None,
    input_bias: Tensor | None,
    backend: str,
) -> Tensor:
    """Return y [T, B, R] of x [T, B, R], weight [K, R], bias [R], starts [T, B] and window [K - 1, B, R].

    input_bias [R] is added to x, but not to the window.
    """
    return implementation("conv1d", backend).forward(x, weight, bias, starts, window, input_bias)


@forward.register_fake
def _(x, weight, bias, starts, window, input_bias, backend):
    return dense_like(x)


@torch.library.custom_op("griffin::causal_conv1d_backward", mutates_args=("grad_x",))
def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    starts: Tensor | None,
    window: Tensor | None,
    input_bias: Tensor | None,
    grad_x: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of weight, bias, input bias and window (the latter two empty without one).

    They are float32, or float64 if x is.

    The gradient of x is written to `grad_x`, which has the shape and dtype of x and any strides.
    """
    results = implementation("conv1d", backend).backward(grad_y, x, weight, starts, window, input_bias, grad_x)
    grad_weight, grad_bias, *others = results
    return grad_weight, grad_bias, *(x.new_empty(0) if grad is None else grad for grad in others)


@backward.register_fake
def _(grad_y, x, weight, starts, window, input_bias, grad_x, backend):
    dtype = accumulation_dtype(x)
    grad_input_bias = x.new_empty(0) if input_bias is None else x.new_empty(x.shape[2], dtype=dtype)
    grad_window = x.new_empty(0) if window is None else x.new_empty(window.shape, dtype=dtype)
    return x.new_empty(weight.shape, dtype=dtype), x.new_empty(x.shape[2], dtype=dtype), grad_input_bias, grad_window


@states_cost(forward)
def _(given, results) -> OperatorCost:
    return OperatorCost(kind="convolution", bytes=touched(given) + touched([results[0]]), kernels=1)


@states_cost(backward)
def _(given, results) -> OperatorCost:
    """One program for the input, and one with a sum over its partial sums for the weight and bias."""
    return OperatorCost(kind="convolution", bytes=touched(given) + touched(results), kernels=3)


def _save(ctx, inputs, output):
    x, weight, bias, starts, window, input_bias, backend = inputs
    ctx.save_for_backward(x, weight, starts, window, input_bias)
    ctx.bias_dtype, ctx.backend = bias.dtype, backend


def _backward(ctx, grad_y):
    x, weight, starts, window, input_bias = ctx.saved_tensors
    (grad_y,) = without_tangents(grad_y)
    grad_x = dense_like(x)
    grad_weight, grad_bias, grad_input_bias, grad_window = backward(
        grad_y, x, weight, starts, window, input_bias, grad_x, ctx.backend
    )
    return (
        grad_x,
        grad_weight.to(weight.dtype),
        grad_bias.to(ctx.bias_dtype),
        None,
        None if window is None else grad_window.to(window.dtype),
        None if input_bias is None else grad_input_bias.to(input_bias.dtype),
        None,
    )


forward.register_autograd(_backward, setup_context=_save)

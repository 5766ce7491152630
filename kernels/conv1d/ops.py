"""The causal convolution as custom operators: what autograd, activation recomputation and torch.compile see of it."""

# No postponed annotations: the operators' schemas are read from them.

import torch
from torch import Tensor

from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.layout import accumulation_dtype, like
from griffin.kernels.selection import implementation


@torch.library.custom_op("griffin::causal_conv1d", mutates_args=())
def forward(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, window: Tensor | None, backend: str
) -> Tensor:
    """y [T, B, R] of x [T, B, R], weight [K, R], bias [R], starts [T, B] and window [K - 1, B, R]."""
    return implementation("conv1d", backend).forward(x, weight, bias, starts, window)


@forward.register_fake
def _(x, weight, bias, starts, window, backend):
    return like(x)


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
    """Gradients, in float32 (float64 where x is), of weight and bias, and of window, empty without one.

    That of x is written to `grad_x`, any tensor like x.
    """
    *grads, grad_window = implementation("conv1d", backend).backward(grad_y, x, weight, starts, window, grad_x)
    return (*grads, x.new_empty(0) if grad_window is None else grad_window)


@backward.register_fake
def _(grad_y, x, weight, starts, window, grad_x, backend):
    dtype = accumulation_dtype(x)
    grad_window = x.new_empty(0) if window is None else x.new_empty(window.shape, dtype=dtype)
    return x.new_empty(weight.shape, dtype=dtype), x.new_empty(x.shape[2], dtype=dtype), grad_window


def _save(ctx, inputs, output):
    x, weight, bias, starts, window, backend = inputs
    ctx.save_for_backward(x, weight, starts, window)
    ctx.bias_dtype, ctx.backend = bias.dtype, backend


def _backward(ctx, grad_y):
    x, weight, starts, window = ctx.saved_tensors
    (grad_y,) = without_tangents(grad_y)
    grad_x = like(x)
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

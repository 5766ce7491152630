"""The gated GeLU as custom operators, opaque to autograd, activation recomputation and torch.compile."""

# No `from __future__ import annotations`: operator schemas are inferred from the annotations.

import torch
from torch import Tensor

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.selection import implementation


@torch.library.custom_op("griffin::gated_gelu", mutates_args=())
def forward(x: Tensor, bias: Tensor, backend: str) -> Tensor:
    """Return y [N, F] of x [N, 2 F], whose channels are contiguous, and bias [2 F]."""
    return implementation("gated_gelu", backend).forward(x, bias)


@forward.register_fake
def _(x, bias, backend):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.custom_op("griffin::gated_gelu_backward", mutates_args=())
def backward(grad_y: Tensor, x: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, contiguous, and of bias, in float32 (float64 if x is)."""
    return implementation("gated_gelu", backend).backward(grad_y, x, bias)


@backward.register_fake
def _(grad_y, x, bias, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape[1], dtype=accumulation_dtype(x))


@states_cost(forward)
def _(given, results) -> OperatorCost:
    return OperatorCost(kind="elementwise", bytes=touched(given) + touched(results), kernels=1)


@states_cost(backward)
def _(given, results) -> OperatorCost:
    """One program, and the sum of its partial sums for the bias."""
    return OperatorCost(kind="elementwise", bytes=touched(given) + touched(results), kernels=2)


def _save(ctx, inputs, output):
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad_y):
    x, bias = ctx.saved_tensors
    (grad_y,) = without_tangents(grad_y)
    grad_x, grad_bias = backward(grad_y, x, bias, ctx.backend)
    return grad_x, grad_bias.to(bias.dtype), None


forward.register_autograd(_backward, setup_context=_save)

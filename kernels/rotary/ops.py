"""Rotary embedding as custom operators, opaque to autograd, activation recomputation and torch.compile."""

# No `from __future__ import annotations`: operator schemas are inferred from the annotations.

import torch
from torch import Tensor

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.selection import implementation


@torch.library.custom_op("griffin::rotary", mutates_args=())
def forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [T, B, H, hd], k and v [T, B, hd] of contiguous qkv [T, B, (H + 2) hd] and angles [T, B, hd / 4]."""
    return implementation("rotary", backend).forward(qkv, cos, sin, heads)


@forward.register_fake
def _(qkv, cos, sin, heads, backend):
    steps, batch, quarter = cos.shape
    q = qkv.new_empty(steps, batch, heads, 4 * quarter)
    return q, *(qkv.new_empty(steps, batch, 4 * quarter) for _ in range(2))


@torch.library.custom_op("griffin::rotary_backward", mutates_args=())
def backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    """Return the gradient of qkv, contiguous, from gradients whose dims are contiguous."""
    return implementation("rotary", backend).backward(grad_q, grad_k, grad_v, cos, sin)


@backward.register_fake
def _(grad_q, grad_k, grad_v, cos, sin, backend):
    steps, batch, heads, head_dim = grad_q.shape
    return grad_q.new_empty(steps, batch, (heads + 2) * head_dim)


@states_cost(forward)
def _(given, results) -> OperatorCost:
    return OperatorCost(kind="elementwise", bytes=touched(given) + touched(results), kernels=1)


@states_cost(backward)
def _(given, results) -> OperatorCost:
    return OperatorCost(kind="elementwise", bytes=touched(given) + touched(results), kernels=1)


def _save(ctx, inputs, output):
    _, cos, sin, _, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, *grads):
    dense = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in without_tangents(*grads))
    return backward(*dense, *ctx.saved_tensors, ctx.backend), None, None, None, None


forward.register_autograd(_backward, setup_context=_save)

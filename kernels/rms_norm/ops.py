"""RMSNorm of a sum as custom operators, opaque to autograd, activation recomputation and torch.compile."""

# No `from __future__ import annotations`: operator schemas are inferred from the annotations.

import torch
from torch import Tensor

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.selection import implementation


@torch.library.custom_op("griffin::rms_norm", mutates_args=())
def forward(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, weight: Tensor, epsilon: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [N, D] of x and branch [N, D], whose channels are contiguous, and bias [D]; their sum, and the scale.

    The sum is empty without a branch. The scale, [N] in float32 (float64 if x is), multiplies each row of the sum.
    """
    y, total, scale = implementation("rms_norm", backend).forward(x, branch, bias, weight, epsilon)
    return y, x.new_empty(0) if total is None else total, scale


@forward.register_fake
def _(x, branch, bias, weight, epsilon, backend):
    total = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[0], dtype=accumulation_dtype(x))


@torch.library.custom_op("griffin::rms_norm_backward", mutates_args=())
def backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    has_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x and branch, contiguous, and those of weight and, if there is one, bias: [1 or 2, D].

    The latter are float32 (float64 if x is). `grad_total` is the gradient of the sum from elsewhere; without a branch,
    the sum `total` is x.
    """
    return implementation("rms_norm", backend).backward(grad_y, grad_total, total, weight, scale, has_bias)


@backward.register_fake
def _(grad_y, grad_total, total, weight, scale, has_bias, backend):
    return total.new_empty(total.shape), scale.new_empty(1 + has_bias, len(weight))


@states_cost(forward)
def _(given, results) -> OperatorCost:
    return OperatorCost(kind="norm", bytes=touched(given) + touched(results), kernels=1)


@states_cost(backward)
def _(given, results) -> OperatorCost:
    """One program, and the sum of its partial sums for weight and bias."""
    return OperatorCost(kind="norm", bytes=touched(given) + touched(results), kernels=2)


def _save(ctx, inputs, output):
    x, branch, bias, weight, _, ctx.backend = inputs
    _, total, scale = output
    ctx.has_branch, ctx.bias_dtype = branch is not None, None if bias is None else bias.dtype
    ctx.save_for_backward(total if ctx.has_branch else x, weight, scale)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([scale] if ctx.has_branch else [total, scale]))


def _backward(ctx, grad_y, grad_total, _):
    total, weight, scale = ctx.saved_tensors
    if not ctx.has_branch:
        grad_total = None
    if grad_y is None:
        grad_bias = None
        if ctx.bias_dtype is not None and grad_total is not None:
            grad_bias = grad_total.sum(0, dtype=scale.dtype).to(ctx.bias_dtype)
        return grad_total, grad_total, grad_bias, None, None, None
    grad_y, grad_total = without_tangents(grad_y, grad_total)
    grad_y, grad_total = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (grad_y, grad_total))
    grad_x, grads = backward(grad_y, grad_total, total, weight, scale, ctx.bias_dtype is not None, ctx.backend)
    grad_weight, *grad_bias = grads.to(weight.dtype) if ctx.bias_dtype in (None, weight.dtype) else grads
    return (
        grad_x,
        grad_x if ctx.has_branch else None,
        grad_bias[0].to(ctx.bias_dtype) if grad_bias else None,
        grad_weight.to(weight.dtype),
        None,
        None,
    )


forward.register_autograd(_backward, setup_context=_save)

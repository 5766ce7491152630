"""RMSNorm of a sum as custom operators: what autograd, activation recomputation and torch.compile see of it."""

# No postponed annotations: the operators' schemas are read from them.

import torch
from torch import Tensor

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.selection import implementation


@torch.library.custom_op("griffin::rms_norm", mutates_args=())
def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, D] of x and branch [N, D], whose channels adjoin; their sum, empty without a branch; and for the backward

    what each row of the sum is multiplied by, [N] in float32 (float64 where x is).
    """
    y, total, scale = implementation("rms_norm", backend).forward(x, branch, weight, epsilon)
    return y, x.new_empty(0) if total is None else total, scale


@forward.register_fake
def _(x, branch, weight, epsilon, backend):
    total = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[0], dtype=accumulation_dtype(x))


@torch.library.custom_op("griffin::rms_norm_backward", mutates_args=())
def backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradient of x and branch, contiguous, and that of weight, in float32 (float64 where x is).

    grad_total is the gradient of the sum from elsewhere; where there was no branch, the sum `total` is x.
    """
    return implementation("rms_norm", backend).backward(grad_y, grad_total, total, weight, scale)


@backward.register_fake
def _(grad_y, grad_total, total, weight, scale, backend):
    return total.new_empty(total.shape), scale.new_empty(weight.shape)


@states_cost(forward)
def _(given, results) -> OperatorCost:
    return OperatorCost(kind="norm", bytes=touched(given) + touched(results), kernels=1)


@states_cost(backward)
def _(given, results) -> OperatorCost:
    """One program, and the sum of its partial sums for the weight."""
    return OperatorCost(kind="norm", bytes=touched(given) + touched(results), kernels=2)


def _save(ctx, inputs, output):
    x, branch, weight, _, ctx.backend = inputs
    _, total, scale = output
    ctx.has_branch = branch is not None
    ctx.save_for_backward(total if ctx.has_branch else x, weight, scale)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([scale] if ctx.has_branch else [total, scale]))


def _backward(ctx, grad_y, grad_total, _):
    total, weight, scale = ctx.saved_tensors
    if not ctx.has_branch:
        grad_total = None
    if grad_y is None:
        return grad_total, grad_total, None, None, None
    grad_y, grad_total = without_tangents(grad_y, grad_total)
    grad_y, grad_total = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (grad_y, grad_total))
    grad_x, grad_weight = backward(grad_y, grad_total, total, weight, scale, ctx.backend)
    return grad_x, grad_x if ctx.has_branch else None, grad_weight.to(weight.dtype), None, None


forward.register_autograd(_backward, setup_context=_save)

"""The linear recurrence as custom operators, opaque to autograd, activation recomputation and torch.compile."""

# No `from __future__ import annotations`: operator schemas are inferred from the annotations.

import torch
from torch import Tensor

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.memory_layout import accumulation_dtype, dense_like
from griffin.kernels.recurrence.plan import select_plan
from griffin.kernels.selection import implementation
from griffin.kernels.triton_launch import multiprocessors


@torch.library.custom_op("griffin::linear_scan", mutates_args=())
def forward(
    a: Tensor, b: Tensor, starts: Tensor | None, initial_state: Tensor | None, chunk: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Return h [T, B, R] and the last state [B, R]."""
    return implementation("linear_scan", backend).forward(a, b, starts, initial_state, chunk)


@forward.register_fake
def _(a, b, starts, initial_state, chunk, backend):
    return dense_like(b), b.new_empty(b.shape[1:], dtype=accumulation_dtype(b))


@torch.library.custom_op("griffin::linear_scan_backward", mutates_args=())
def backward(
    grad_h: Tensor,
    grad_last: Tensor,
    a: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    h: Tensor,
    chunk: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a, b and the initial state."""
    return implementation("linear_scan", backend).backward(grad_h, grad_last, a, starts, initial_state, h, chunk)


@backward.register_fake
def _(grad_h, grad_last, a, starts, initial_state, h, chunk, backend):
    return dense_like(a), dense_like(h), h.new_empty(h.shape[1:], dtype=accumulation_dtype(h))


@states_cost(forward)
def _(given, results) -> OperatorCost:
    """Chunked, a and b are read a second time; three programs then: chunk ends, their chain, the scan."""
    b, chunk = given[1], given[4]
    steps, batch, width = b.shape
    chunks = select_plan(steps, batch, width, multiprocessors(b.device), chunk).chunks
    again = touched(given[:2]) if chunks > 1 else 0
    return OperatorCost(kind="scan", bytes=touched(given) + touched(results) + again, kernels=3 if chunks > 1 else 1)


@states_cost(backward)
def _(given, results) -> OperatorCost:
    """Chunked, a and the gradient of h are read a second time."""
    grad_h, a, chunk = given[0], given[2], given[6]
    steps, batch, width = grad_h.shape
    chunks = select_plan(steps, batch, width, multiprocessors(grad_h.device), chunk).chunks
    again = touched([grad_h, a]) if chunks > 1 else 0
    return OperatorCost(kind="scan", bytes=touched(given) + touched(results) + again, kernels=3 if chunks > 1 else 1)


def _save(ctx, inputs, output):
    a, _, starts, initial_state, chunk, backend = inputs
    ctx.save_for_backward(a, starts, initial_state, output[0])
    ctx.chunk, ctx.backend = chunk, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_h, grad_last):
    a, starts, initial_state, h = ctx.saved_tensors
    if grad_h is None:
        grad_h = torch.zeros_like(h)
    if grad_last is None:
        grad_last = h.new_zeros(h.shape[1:], dtype=accumulation_dtype(h))
    grad_h, grad_last = without_tangents(grad_h, grad_last)
    grad_a, grad_b, grad_initial = backward(grad_h, grad_last, a, starts, initial_state, h, ctx.chunk, ctx.backend)
    if initial_state is not None:
        grad_initial = grad_initial.to(initial_state.dtype)
    return grad_a, grad_b, None, None if initial_state is None else grad_initial, None, None


forward.register_autograd(_backward, setup_context=_save)

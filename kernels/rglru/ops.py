"""The RG-LRU as custom operators, opaque to autograd, activation recomputation and torch.compile.

Absent optional results are tensors without elements.
"""

# No `from __future__ import annotations`: operator schemas are inferred from the annotations.

import torch
from torch import Tensor

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.memory_layout import accumulation_dtype, dense_like
from griffin.kernels.recurrence.plan import select_plan
from griffin.kernels.rglru.reference import RGLRUInputs
from griffin.kernels.selection import implementation
from griffin.kernels.triton_launch import multiprocessors


def _or_empty(tensor: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if tensor is None else tensor


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


@torch.library.custom_op("griffin::rglru", mutates_args=())
def forward(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    decay: Tensor,
    branch: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    bias: Tensor | None,
    save_states: bool,
    chunk: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [T, B, R], the last state [B, R], and for the backward pass states and first states.

    With `save_states`, states are [T, B, R] in the dtype of y, or empty without a branch, as they equal y. Without it,
    first states are the initial states of chunks of time, [chunks, B, R], or empty if there is at most one chunk.
    """
    inputs = RGLRUInputs(x, input_gate, recurrence_gate, decay, branch, starts, initial_state, bias)
    y, last_state, states, first_states = implementation("rglru", backend).forward(inputs, save_states, chunk)
    return y, last_state, _or_empty(states, x), _or_empty(first_states, x)


@forward.register_fake
def _(x, input_gate, recurrence_gate, decay, branch, starts, initial_state, bias, save_states, chunk, backend):
    steps, batch, width = x.shape
    dtype = accumulation_dtype(x)
    states = dense_like(x) if save_states and branch is not None else x.new_empty(0)
    first_states = x.new_empty(0)
    if backend == "triton" and not save_states:
        chunks = select_plan(steps, batch, width, multiprocessors(x.device), chunk).chunks
        if chunks > 1:
            first_states = x.new_empty(chunks, batch, width, dtype=dtype)
    return dense_like(x), x.new_empty(batch, width, dtype=dtype), states, first_states


@torch.library.custom_op("griffin::rglru_backward", mutates_args=("grad_branch",))
def backward(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    decay: Tensor,
    branch: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    bias: Tensor | None,
    states: Tensor | None,
    first_states: Tensor | None,
    grad_y: Tensor,
    grad_last: Tensor,
    grad_branch: Tensor | None,
    chunk: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, gates, decay, initial state and biases (empty without them).

    The gradient of the branch is written to `grad_branch`, which has the shape and dtype of the branch and any strides.
    If `states` is None, the states are recomputed.
    """
    inputs = RGLRUInputs(x, input_gate, recurrence_gate, decay, branch, starts, initial_state, bias)
    *grads, grad_bias = implementation("rglru", backend).backward(
        inputs, states, first_states, grad_y, grad_last, grad_branch, chunk
    )
    return (*grads, _or_empty(grad_bias, x))


@backward.register_fake
def _(
    x, input_gate, recurrence_gate, decay, branch, starts, initial_state, bias, states, first_states,
    grad_y, grad_last, grad_branch, chunk, backend,
):  # fmt: skip
    dtype = accumulation_dtype(x)
    return (
        dense_like(x),
        dense_like(input_gate),
        dense_like(recurrence_gate),
        decay.new_empty(decay.shape, dtype=dtype),
        x.new_empty(x.shape[1:], dtype=dtype),
        x.new_empty(0) if bias is None else x.new_empty(bias.shape, dtype=dtype),
    )


@states_cost(forward)
def _(given, results) -> OperatorCost:
    """Chunked, x and both gates are read a second time; three programs then: chunk ends, their chain, the scan."""
    x, *_, chunk, _ = given
    steps, batch, width = x.shape
    chunks = select_plan(steps, batch, width, multiprocessors(x.device), chunk).chunks
    again = 3 * touched([x]) if chunks > 1 else 0
    return OperatorCost(kind="scan", bytes=touched(given) + touched(results) + again, kernels=3 if chunks > 1 else 1)


@states_cost(backward)
def _(given, results) -> OperatorCost:
    """Chunked, the recurrence gate, branch and gradient are read twice. The gradient of the decay is summed in two."""
    x, states, chunk = given[0], given[8], given[13]
    steps, batch, width = x.shape
    chunks = select_plan(steps, batch, width, multiprocessors(x.device), chunk).chunks
    again = 3 * touched([x]) if chunks > 1 else 0
    if states is None:  # computed again: x and both gates read, states written and read
        again += 4 * touched([x])
    moved = touched(given) + touched(results) + again
    return OperatorCost(kind="scan", bytes=moved, kernels=5 if chunks > 1 else 3)


def _save(ctx, inputs, output):
    *tensors, save_states, chunk, backend = inputs
    y, _, states, first_states = output
    branch = RGLRUInputs(*tensors).branch
    saved_states = None if not save_states else y if branch is None else states
    ctx.save_for_backward(*tensors, saved_states, _or_none(first_states))
    ctx.chunk, ctx.backend = chunk, backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(states, first_states)


def _backward(ctx, grad_y, grad_last, *_):
    *saved, states, first_states = ctx.saved_tensors
    inputs = RGLRUInputs(*saved)
    if grad_y is None:
        grad_y = torch.zeros_like(inputs.x)
    if grad_last is None:
        grad_last = inputs.x.new_zeros(inputs.x.shape[1:], dtype=accumulation_dtype(inputs.x))
    grad_y, grad_last = without_tangents(grad_y, grad_last)
    grad_branch = None if inputs.branch is None else dense_like(inputs.branch)
    *grads, grad_decay, grad_initial, grad_bias = backward(
        *inputs, states, first_states, grad_y, grad_last, grad_branch, ctx.chunk, ctx.backend
    )
    return (
        *grads,
        grad_decay.to(inputs.decay.dtype),
        grad_branch,
        None,
        None if inputs.initial_state is None else grad_initial.to(inputs.initial_state.dtype),
        None if inputs.bias is None else grad_bias.to(inputs.bias.dtype),
        None,
        None,
        None,
    )


forward.register_autograd(_backward, setup_context=_save)

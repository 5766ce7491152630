"""The RG-LRU as custom operators: what autograd, activation recomputation and torch.compile see of it.

Both have no notion of what happens inside. Optional results are tensors without elements where they are not there.
"""

# No postponed annotations: the operators' schemas are read from them.

import torch
from torch import Tensor

from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.launch import multiprocessors
from griffin.kernels.layout import accumulation_dtype, like
from griffin.kernels.recurrence.plan import select_plan
from griffin.kernels.rglru.reference import Given
from griffin.kernels.selection import implementation


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
    gate_bias: Tensor | None,
    save_states: bool,
    chunk: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, B, R] and the last state [B, R]; then for the backward

    with `save_states` the states [T, B, R] in the dtype of y, empty where they are y itself for lack of a branch;
    without, the states that chunks of time begin with, [chunks, B, R], empty where there are none or one.
    """
    given = Given(x, input_gate, recurrence_gate, decay, branch, starts, initial_state, gate_bias)
    y, last_state, states, first_states = implementation("rglru", backend).forward(given, save_states, chunk)
    return y, last_state, _or_empty(states, x), _or_empty(first_states, x)


@forward.register_fake
def _(x, input_gate, recurrence_gate, decay, branch, starts, initial_state, gate_bias, save_states, chunk, backend):
    steps, batch, width = x.shape
    dtype = accumulation_dtype(x)
    states = like(x) if save_states and branch is not None else x.new_empty(0)
    first_states = x.new_empty(0)
    if backend == "triton" and not save_states:
        chunks = select_plan(steps, batch, width, multiprocessors(x.device), chunk).chunks
        if chunks > 1:
            first_states = x.new_empty(chunks, batch, width, dtype=dtype)
    return like(x), x.new_empty(batch, width, dtype=dtype), states, first_states


@torch.library.custom_op("griffin::rglru_backward", mutates_args=("grad_branch",))
def backward(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    decay: Tensor,
    branch: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    gate_bias: Tensor | None,
    states: Tensor | None,
    first_states: Tensor | None,
    grad_y: Tensor,
    grad_last: Tensor,
    grad_branch: Tensor | None,
    chunk: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, decay, initial state and the gates' biases (empty without them).

    The branch's is written to `grad_branch`, any tensor like the branch. `states` None computes them again.
    """
    given = Given(x, input_gate, recurrence_gate, decay, branch, starts, initial_state, gate_bias)
    *grads, grad_bias = implementation("rglru", backend).backward(
        given, states, first_states, grad_y, grad_last, grad_branch, chunk
    )
    return (*grads, _or_empty(grad_bias, x))


@backward.register_fake
def _(
    x, input_gate, recurrence_gate, decay, branch, starts, initial_state, gate_bias, states, first_states,
    grad_y, grad_last, grad_branch, chunk, backend,
):  # fmt: skip
    dtype = accumulation_dtype(x)
    return (
        like(x),
        like(input_gate),
        like(recurrence_gate),
        decay.new_empty(decay.shape, dtype=dtype),
        x.new_empty(x.shape[1:], dtype=dtype),
        x.new_empty(0) if gate_bias is None else x.new_empty(gate_bias.shape, dtype=dtype),
    )


def _save(ctx, inputs, output):
    *given, save_states, chunk, backend = inputs
    y, _, states, first_states = output
    branch = Given(*given).branch
    kept = None if not save_states else y if branch is None else states
    ctx.save_for_backward(*given, kept, _or_none(first_states))
    ctx.chunk, ctx.backend = chunk, backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(states, first_states)


def _backward(ctx, grad_y, grad_last, *_):
    *saved, states, first_states = ctx.saved_tensors
    given = Given(*saved)
    if grad_y is None:
        grad_y = torch.zeros_like(given.x)
    if grad_last is None:
        grad_last = given.x.new_zeros(given.x.shape[1:], dtype=accumulation_dtype(given.x))
    grad_y, grad_last = without_tangents(grad_y, grad_last)
    grad_branch = None if given.branch is None else like(given.branch)
    *grads, grad_decay, grad_initial, grad_bias = backward(
        *given, states, first_states, grad_y, grad_last, grad_branch, ctx.chunk, ctx.backend
    )
    return (
        *grads,
        grad_decay.to(given.decay.dtype),
        grad_branch,
        None,
        None if given.initial_state is None else grad_initial.to(given.initial_state.dtype),
        None if given.gate_bias is None else grad_bias.to(given.gate_bias.dtype),
        None,
        None,
        None,
    )


forward.register_autograd(_backward, setup_context=_save)

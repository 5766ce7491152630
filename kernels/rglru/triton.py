"""The RG-LRU by Triton programs: gates, decay, scan and the product with the branch in one pass over memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.kernels.recurrence import launch
from griffin.kernels.rglru.reference import GATE_SCALE, Given


def _inputs(given: Given, chunk: int | None) -> launch.Inputs:
    return launch.Inputs.of(
        given.x,
        given.recurrence_gate,
        input_gate=given.input_gate,
        rate=-GATE_SCALE * F.softplus(given.decay.float()),
        branch=given.branch,
        starts=given.starts,
        initial_state=given.initial_state,
        gate_bias=given.gate_bias,
        chunk=chunk,
    )


def forward(given: Given, save_states: bool, chunk: int | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `griffin.kernels.rglru.ops.forward`."""
    inputs = _inputs(given, chunk)
    firsts = launch.first_states(inputs)
    y, states, last_state = launch.forward(inputs, firsts, keep_states=save_states)
    return y, last_state, states, None if save_states or inputs.plan.chunks == 1 else firsts


def backward(
    given: Given,
    states: Tensor | None,
    first_states: Tensor | None,
    grad_y: Tensor,
    grad_last: Tensor,
    grad_branch: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As `griffin.kernels.rglru.ops.backward`."""
    inputs = _inputs(given, chunk)
    if states is None:
        firsts = inputs.initial_state if first_states is None else first_states
        states, _, _ = launch.forward(replace(inputs, branch=None), firsts, keep_states=False)
    grads = launch.backward(inputs, states, grad_y, grad_last, grad_branch)
    assert grads.rate is not None
    assert grads.input_gate is not None
    grad_decay = grads.rate * (-GATE_SCALE * torch.sigmoid(given.decay.float()))
    return grads.term, grads.input_gate, grads.gate, grad_decay, grads.initial_state, grads.gate_bias

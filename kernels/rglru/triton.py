"""RG-LRU with Triton programs: gates, decay, scan and the product with the branch in one pass over memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.kernels.recurrence import scan
from griffin.kernels.rglru.reference import GATE_SCALE, RGLRUInputs


def _scan_inputs(inputs: RGLRUInputs, chunk: int | None) -> scan.ScanInputs:
    return scan.ScanInputs.of(
        inputs.x,
        inputs.recurrence_gate,
        input_gate=inputs.input_gate,
        rate=-GATE_SCALE * F.softplus(inputs.decay.float()),
        branch=inputs.branch,
        starts=inputs.starts,
        initial_state=inputs.initial_state,
        gate_bias=inputs.gate_bias,
        chunk=chunk,
    )


def forward(
    inputs: RGLRUInputs, save_states: bool, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute `griffin.kernels.rglru.ops.forward`."""
    scan_inputs = _scan_inputs(inputs, chunk)
    first_states = scan.first_states(scan_inputs)
    y, states, last_state = scan.forward(scan_inputs, first_states, keep_states=save_states)
    return y, last_state, states, None if save_states or scan_inputs.plan.chunks == 1 else first_states


def backward(
    inputs: RGLRUInputs,
    states: Tensor | None,
    first_states: Tensor | None,
    grad_y: Tensor,
    grad_last: Tensor,
    grad_branch: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute `griffin.kernels.rglru.ops.backward`."""
    scan_inputs = _scan_inputs(inputs, chunk)
    if states is None:
        first_states = scan_inputs.initial_state if first_states is None else first_states
        states, _, _ = scan.forward(replace(scan_inputs, branch=None), first_states, keep_states=False)
    grads = scan.backward(scan_inputs, states, grad_y, grad_last, grad_branch)
    assert grads.rate is not None
    assert grads.input_gate is not None
    grad_decay = grads.rate * (-GATE_SCALE * torch.sigmoid(inputs.decay.float()))
    return grads.term, grads.input_gate, grads.gate, grad_decay, grads.initial_state, grads.gate_bias

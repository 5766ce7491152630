"""Diagonal linear recurrence with Triton programs."""

from __future__ import annotations

from torch import Tensor

from griffin.kernels.recurrence import scan


def forward(
    a: Tensor, b: Tensor, starts: Tensor | None, initial_state: Tensor | None, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Compute `griffin.kernels.linear_scan.ops.forward`."""
    inputs = scan.ScanInputs.of(b, a, starts=starts, initial_state=initial_state, chunk=chunk)
    h, _, last_state = scan.forward(inputs, scan.first_states(inputs), keep_states=False)
    return h, last_state


def backward(
    grad_h: Tensor,
    grad_last: Tensor,
    a: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    h: Tensor,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `griffin.kernels.linear_scan.ops.backward`."""
    # The backward pass does not read b; h has the same shape and dtype.
    inputs = scan.ScanInputs.of(h, a, starts=starts, initial_state=initial_state, chunk=chunk)
    grads = scan.backward(inputs, h, grad_h, grad_last)
    return grads.gate, grads.term, grads.initial_state

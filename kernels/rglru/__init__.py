"""Real-gated linear recurrent unit (RG-LRU), the recurrence of Griffin and Hawk."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.arguments import FLOATING, check_argument, check_chunk, check_sequences
from griffin.kernels.backends import AUTO
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.rglru import ops
from griffin.kernels.rglru.reference import RGLRUInputs, rglru_reference
from griffin.kernels.rglru.step import rglru_step
from griffin.kernels.selection import resolve_backend

__all__ = ["rglru", "rglru_step"]


def rglru(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    decay: Tensor,
    *,
    gate_bias: Tensor | None = None,
    branch: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    batch_first: bool = False,
    backend: str = AUTO,
    save_states: bool = True,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the RG-LRU of packed sequences (arXiv 2402.19427, section 2.4, equations 1-4).

        r = sigmoid(recurrence_gate)        i = sigmoid(input_gate)
        log a = -8 r softplus(decay)        m = sqrt(1 - a^2)
        h_t = a_t h_{t-1} + m_t (i_t x_t)   y = h, or with a branch h gelu(branch) (section 2.3; GeLU by tanh)

    At a document's first token a = 0 and m = 1. The derivative of the square root is bounded: 1 / sqrt(max(4 u, 1e-6)).
    States, gates, products and sums are float32, or float64 if x is; y is rounded once. Gradients flow to x, both
    gates, their biases, decay, branch and initial_state, from both results. Results are bitwise reproducible.

    Args:
        x: [T, B, R], with any strides; bfloat16, float16, float32 or float64. Tensors with contiguous channels are not
            copied.
        input_gate, recurrence_gate: pre-sigmoid gates; shape and dtype of x.
        decay: [R], floating point; the negative of the paper's Lambda.
        gate_bias: [2, R], floating point; added to the input gate and the recurrence gate. None: the gates include it.
        branch: the recurrent block's other branch, before its GeLU; shape and dtype of x.
        starts: [T, B] bool, True at each document's first token. None: each sequence is one document, which starts at
            position 0 unless `initial_state` is passed. Otherwise a position 0 that is not a start continues from
            `initial_state`, or from a zero state without one.
        initial_state: [B, R], floating point; the state before position 0.
        batch_first: x, the gates, `branch`, `starts` and y have the batch axis before the time axis.
        backend: "reference" (a loop, differentiated by autograd), "cpu", "triton", or "auto", which
            selects by `griffin.kernels.selection.select_backend`.
        save_states: save h for the backward pass. False recomputes it there: with a branch this saves a tensor as large
            as x, and costs about a third of a forward and backward pass.
        chunk: steps of time per Triton program; see `griffin.kernels.recurrence.plan.select_plan`.

    Returns:
        y, with the shape and dtype of x, and the state after the last position, [B, R] in float32 (float64 if x is).

    Raises:
        NotImplementedError: forward-mode differentiation with a backend other than "reference".
        ValueError: the shape, dtype or device of an argument does not match x, or the backend is unknown or cannot run.
    """
    check_sequences("x", x)
    batch, width = x.shape[0 if batch_first else 1], x.shape[2]
    for name, tensor, shape, dtypes in (
        ("input_gate", input_gate, x.shape, (x.dtype,)),
        ("recurrence_gate", recurrence_gate, x.shape, (x.dtype,)),
        ("decay", decay, (width,), FLOATING),
        ("gate_bias", gate_bias, (2, width), FLOATING),
        ("branch", branch, x.shape, (x.dtype,)),
        ("starts", starts, x.shape[:2], (torch.bool,)),
        ("initial_state", initial_state, (batch, width), FLOATING),
    ):
        check_argument(name, tensor, shape, dtypes, "x", x)
    check_chunk(chunk)
    backend = resolve_backend(backend, x.device, x.dtype)
    if batch_first:
        x, input_gate, recurrence_gate = (tensor.transpose(0, 1) for tensor in (x, input_gate, recurrence_gate))
        branch, starts = (None if tensor is None else tensor.transpose(0, 1) for tensor in (branch, starts))
    inputs = RGLRUInputs(x, input_gate, recurrence_gate, decay, branch, starts, initial_state, gate_bias)
    if backend == "reference":
        y, last_state = rglru_reference(inputs)
    else:
        x, input_gate, recurrence_gate, decay, branch, initial_state, gate_bias = without_tangents(
            x, input_gate, recurrence_gate, decay, branch, initial_state, gate_bias
        )
        inputs = RGLRUInputs(x, input_gate, recurrence_gate, decay, branch, starts, initial_state, gate_bias)
        y, last_state, _, _ = ops.forward(*inputs, save_states, chunk, backend)
    return y.transpose(0, 1) if batch_first else y, last_state

"""Single-position RG-LRU, for generation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.rglru import ops
from griffin.kernels.rglru.reference import GATE_SCALE

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def rglru_step(decay: Tensor, backend: str) -> Step:
    """Return a function that computes one position of `griffin.kernels.rglru.rglru`, without gradients.

    The function is step(x, input_gate, recurrence_gate, branch, state), with tensors [R, B] of one dtype and the state
    [R, B] in float32 (float64 if x is): channels first, as matrix products of few sequences produce them. It returns y,
    like x, and updates the state in place.

    Args:
        decay: [R].
        backend: "triton" runs one program, all others a dozen PyTorch operations on any device.
    """
    if backend == "triton":

        def fused(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, branch: Tensor, state: Tensor) -> Tensor:
            x, input_gate, recurrence_gate, branch, state = without_tangents(
                x, input_gate, recurrence_gate, branch, state
            )
            x, input_gate, recurrence_gate, branch = (
                tensor.t()[None].contiguous() for tensor in (x, input_gate, recurrence_gate, branch)
            )
            y, last, _, _ = ops.forward(
                x, input_gate, recurrence_gate, decay, branch, None, state.t(), None, False, 0, backend
            )
            state.copy_(last.t())
            return y[0].t()

        return fused

    dtype = accumulation_dtype(decay)
    rate = -GATE_SCALE * F.softplus(decay.to(dtype))[:, None]

    def step(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, branch: Tensor, state: Tensor) -> Tensor:
        log_a = recurrence_gate.to(dtype).sigmoid() * rate
        gated = (input_gate.to(dtype).sigmoid() * x).mul_((2 * log_a).expm1_().neg_().sqrt_())
        torch.addcmul(gated, log_a.exp_(), state, out=state)
        return F.gelu(branch.to(dtype), approximate="tanh").mul_(state).to(x.dtype)

    return step

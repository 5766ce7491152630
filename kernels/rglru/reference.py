"""Reference RG-LRU: a loop over time that the other backends are tested against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.recurrence import MIN_SQRT_ARGUMENT

GATE_SCALE = 8.0  # c of log a = -c * sigmoid(recurrence_gate) * softplus(p); section 2.4


class RGLRUInputs(NamedTuple):
    """Tensor arguments of `griffin.kernels.rglru.rglru`, time-major."""

    x: Tensor
    input_gate: Tensor
    recurrence_gate: Tensor
    decay: Tensor
    branch: Tensor | None
    starts: Tensor | None
    initial_state: Tensor | None
    gate_bias: Tensor | None = None


class _BoundedSqrt(torch.autograd.Function):
    """Square root whose derivative is 1 / sqrt(max(4 x, 1e-6))."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sqrt()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (4 * x.clamp(min=MIN_SQRT_ARGUMENT)).sqrt()

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent / (4 * x.clamp(min=MIN_SQRT_ARGUMENT)).sqrt()


def rglru_reference(inputs: RGLRUInputs) -> tuple[Tensor, Tensor]:
    """Return y and the last state, differentiated by autograd. Arithmetic is float32, or float64 if x is."""
    x, input_gate, recurrence_gate, decay, branch, starts, initial_state, gate_bias = inputs
    dtype = accumulation_dtype(x)
    if gate_bias is not None:
        input_gate, recurrence_gate = input_gate.to(dtype) + gate_bias[0], recurrence_gate.to(dtype) + gate_bias[1]
    steps, batch, width = x.shape
    if starts is None:
        starts = torch.zeros(steps, batch, dtype=torch.bool, device=x.device)
        starts[0] = initial_state is None
    at_start = starts[..., None]

    log_a = -GATE_SCALE * recurrence_gate.to(dtype).sigmoid() * F.softplus(decay.to(dtype))  # [T, B, R]
    a = log_a.exp().masked_fill(at_start, 0)
    multiplier = _BoundedSqrt.apply(-torch.expm1(2 * log_a)).masked_fill(at_start, 1)
    b = multiplier * (input_gate.to(dtype).sigmoid() * x.to(dtype))

    h = x.new_zeros(batch, width, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    states = []
    for a_t, b_t in zip(a, b, strict=True):
        h = a_t * h + b_t
        states.append(h)
    y = torch.stack(states)
    if branch is not None:
        y = y * F.gelu(branch.to(dtype), approximate="tanh")
    return y.to(x.dtype), h

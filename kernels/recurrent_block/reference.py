"""The recurrent block between its linears, from the references of its operations, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from griffin.kernels.conv1d.reference import causal_conv1d_reference
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.rglru.reference import RGLRUInputs, rglru_reference

Observer = Callable[[Tensor, Tensor], None]  # of the input gate and the recurrence gate


def recurrent_block_reference(
    xy: Tensor,
    xy_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    decay: Tensor,
    starts: Tensor | None,
    observe: Observer | None,
) -> tuple[Tensor, Tensor]:
    """Compute `griffin.kernels.recurrent_block.recurrent_block`."""
    if xy_bias is not None:
        dtype = accumulation_dtype(xy)
        xy = xy.to(dtype) + xy_bias.to(dtype)
    before, branch = xy.chunk(2, dim=-1)
    x = causal_conv1d_reference(before, conv_weight, conv_bias, starts, None).to(gate_weight.dtype)
    blocks = x.unflatten(-1, (len(gate_weight), -1))
    gates = torch.einsum("tbni,nio->tbno", blocks, gate_weight).chunk(2, dim=-1)
    input_gate, recurrence_gate = (gate.flatten(2) for gate in gates)
    if observe is not None:
        observe(input_gate + gate_bias[0], recurrence_gate + gate_bias[1])
    bias = torch.cat((gate_bias, torch.zeros_like(gate_bias[:1])))  # the branch has its own
    return rglru_reference(RGLRUInputs(x, input_gate, recurrence_gate, decay, branch, starts, None, bias))

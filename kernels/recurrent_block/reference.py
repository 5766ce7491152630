"""The recurrent block between its linears, of the definitions of its operations, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from griffin.kernels.conv1d.reference import causal_conv1d_reference
from griffin.kernels.rglru.reference import RGLRUInputs, rglru_reference

Observer = Callable[[Tensor, Tensor], None]  # of the input gate and the recurrence gate


def recurrent_block_reference(
    xy: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    decay: Tensor,
    starts: Tensor | None,
    observe: Observer | None,
) -> tuple[Tensor, Tensor]:
    """As `griffin.kernels.recurrent_block.recurrent_block`."""
    before, branch = xy.chunk(2, dim=-1)
    x = causal_conv1d_reference(before, conv_weight, conv_bias, starts, None)
    blocks = x.unflatten(-1, (len(gate_weight), -1))
    gates = torch.einsum("tbni,nio->tbno", blocks, gate_weight).chunk(2, dim=-1)
    input_gate, recurrence_gate = (gate.flatten(2) for gate in gates)
    if observe is not None:
        observe(input_gate + gate_bias[0], recurrence_gate + gate_bias[1])
    return rglru_reference(RGLRUInputs(x, input_gate, recurrence_gate, decay, branch, starts, None, gate_bias))

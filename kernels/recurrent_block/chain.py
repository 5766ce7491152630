"""The recurrent block between its linears, with a backward that writes gradients where they belong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from griffin.kernels.conv1d import ops as conv_ops
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.recurrent_block.reference import Observer
from griffin.kernels.rglru import ops as rglru_ops


class RecurrentBlock(torch.autograd.Function):
    """As `griffin.kernels.recurrent_block.recurrent_block`.

    The operators read and write halves of xy and of its gradient, blocks of gates where they lie among the channels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        xy: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        decay: Tensor,
        starts: Tensor | None,
        save_states: bool,
        backend: str,
        observe: Observer | None,
    ) -> tuple[Tensor, Tensor]:
        before, branch = xy.chunk(2, dim=-1)
        x = conv_ops.forward(before, conv_weight, conv_bias, starts, None, backend).contiguous()
        gates = torch.empty_like(x), torch.empty_like(x)
        for gate, weight in zip(gates, gate_weight.chunk(2, dim=-1), strict=True):
            torch.bmm(_blocks(x, weight), weight, out=_blocks(gate, weight))
        if observe is not None:
            observe(gates[0] + gate_bias[0], gates[1] + gate_bias[1])
        y, last, *states = rglru_ops.forward(
            x, *gates, decay, branch, starts, None, gate_bias, save_states, None, backend
        )
        ctx.save_for_backward(xy, x, *gates, *states, conv_weight, gate_weight, gate_bias, decay, starts)
        ctx.bias_dtype, ctx.save_states, ctx.backend = conv_bias.dtype, save_states, backend
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        xy, x, *gates, states, first_states, conv_weight, gate_weight, gate_bias, decay, starts = ctx.saved_tensors
        before, branch = xy.chunk(2, dim=-1)
        grad_xy = torch.empty_like(xy)
        grad_before, grad_branch = grad_xy.chunk(2, dim=-1)
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        if grad_last is None:
            grad_last = x.new_zeros(x.shape[1:], dtype=accumulation_dtype(x))
        grad_x, *grad_gates, grad_decay, _, grad_gate_bias = rglru_ops.backward(
            *(x, *gates, decay, branch, starts, None, gate_bias),
            states if ctx.save_states else None,
            first_states if first_states.numel() else None,
            *(grad_y, grad_last, grad_branch, None, ctx.backend),
        )
        grad_gate_weight = torch.empty_like(gate_weight)
        for grad, weight, out in zip(
            grad_gates, gate_weight.chunk(2, dim=-1), grad_gate_weight.chunk(2, dim=-1), strict=True
        ):
            torch.bmm(_blocks(x, weight).mT, _blocks(grad, weight), out=out)
            into = _blocks(grad_x, weight)
            torch.baddbmm(into, _blocks(grad, weight), weight.mT, out=into)
        grad_conv_weight, grad_conv_bias, _ = conv_ops.backward(
            grad_x, before, conv_weight, starts, None, grad_before, ctx.backend
        )
        return (
            grad_xy,
            grad_conv_weight.to(conv_weight.dtype),
            grad_conv_bias.to(ctx.bias_dtype),
            grad_gate_weight,
            grad_gate_bias.to(gate_bias.dtype),
            grad_decay.to(decay.dtype),
            None,
            None,
            None,
            None,
        )


def _blocks(x: Tensor, weight: Tensor) -> Tensor:
    """[N, T B, w], a view of contiguous x [T, B, R]."""
    return x.view(-1, len(weight), weight.shape[1]).transpose(0, 1)

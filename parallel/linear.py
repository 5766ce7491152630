"""Tensor-parallel linear layers, and their single-token counterparts for decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from griffin.parallel.context import Context
from griffin.parallel.sharding import Piece, describe, normal, zeros

# A layer for one token of B sequences, channels first: [inputs, B] -> [outputs, B], so that matrix products with few
# sequences read the weights in their memory order.
LayerStep = Callable[[Tensor], Tensor]


def fused_column_linear(
    context: Context, names: Sequence[str], outputs: int, *, atoms: int, std: float
) -> ColumnParallelLinear:
    """Return several column-parallel linears [outputs, D] of the same input, fused into one.

    A rank's weight holds its rows of the first, then its rows of the second, and so on. Biases are initialised to zero.
    """
    linear = ColumnParallelLinear(
        context.model.width,
        len(names) * outputs,
        config=context.megatron,
        init_method=None,
        bias=True,
        gather_output=False,
        tp_group=context.grid.tensor_group,
    )
    local = outputs // context.grid.tensor_size
    for suffix, parameter, shape, init in (
        ("weight", linear.weight, (outputs, context.model.width), normal(std)),
        ("bias", linear.bias, (outputs,), zeros),
    ):
        describe(
            parameter,
            *(
                Piece(name=f"{name}.{suffix}", shape=shape, init=init, axis=0, atoms=atoms, start=place * local)
                for place, name in enumerate(names)
            ),
            weight_decay=suffix == "weight",
        )
    return linear


def row_linear(context: Context, name: str, inputs: int, *, atoms: int) -> RowParallelLinear:
    """Return a row-parallel output linear [D, inputs]: sharded input, output all-reduced over tensor ranks."""
    width = context.model.width
    linear = RowParallelLinear(
        inputs,
        width,
        config=context.megatron,
        init_method=None,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=context.grid.tensor_group,
    )
    std = math.sqrt(2 / context.model.blocks / inputs)
    describe(
        linear.weight,
        Piece(name=f"{name}.weight", shape=(width, inputs), init=normal(std), axis=1, atoms=atoms, dim=1),
        weight_decay=True,
    )
    describe(
        linear.bias,
        Piece(name=f"{name}.bias", shape=(width,), init=zeros),
        weight_decay=False,
        sequence_parallel=True,
    )
    return linear


def column_step(linear: ColumnParallelLinear | RowParallelLinear) -> LayerStep:
    """Return the single-token column-parallel linear, which computes this rank's shard of the output."""
    weight, bias = linear.weight, linear.bias[:, None]
    return lambda x: torch.addmm(bias, weight, x)


def row_step(linear: RowParallelLinear) -> LayerStep:
    """Return the single-token row-parallel linear, whose output is all-reduced over tensor ranks."""
    weight, bias, group = linear.weight, linear.bias[:, None], linear.tp_group
    if group.size() == 1:
        return column_step(linear)

    def step(x: Tensor) -> Tensor:
        y = torch.mm(weight, x)
        dist.all_reduce(y, group=group)
        return y.add_(bias)

    return step

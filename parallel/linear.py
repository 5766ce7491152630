"""Linears sharded over tensor ranks, and the same for a token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from griffin.parallel.context import Context
from griffin.parallel.sharding import Piece, describe, normal, zeros

# A layer for one token of B sequences, channels first: [outputs, B] of [inputs, B], so that products of a few sequences
# read weights as they lie.
LayerStep = Callable[[Tensor], Tensor]


def fused_column_linear(
    context: Context, names: tuple[str, str], outputs: int, *, atoms: int, std: float, skip_bias_add: bool = False
) -> ColumnParallelLinear:
    """Two column-parallel linears [outputs, D] of one input as one matrix product: a rank's rows of the first, then
    its rows of the second. Biases start at zero; with `skip_bias_add` the caller adds them."""
    linear = ColumnParallelLinear(
        context.model.width,
        2 * outputs,
        config=context.megatron,
        init_method=None,
        bias=True,
        gather_output=False,
        skip_bias_add=skip_bias_add,
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
    """Row-parallel output linear [D, inputs] of a branch: its input is sharded, its output summed over tensor ranks."""
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
    """Of a column-parallel linear: this rank's part of the result."""
    weight, bias = linear.weight, linear.bias[:, None]
    return lambda x: torch.addmm(bias, weight, x)


def row_step(linear: RowParallelLinear) -> LayerStep:
    """Of a row-parallel linear: the sum over tensor ranks."""
    weight, bias, group = linear.weight, linear.bias[:, None], linear.tp_group
    if group.size() == 1:
        return column_step(linear)

    def step(x: Tensor) -> Tensor:
        y = torch.mm(weight, x)
        dist.all_reduce(y, group=group)
        return y.add_(bias)

    return step

"""The gated MLP, sharded over its width (paper, sections 2.3 and 4.1)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from griffin.parallel.config import axis_atoms
from griffin.parallel.context import Context
from griffin.parallel.sharding import Piece, describe, normal, zeros


def fused_column_linear(
    context: Context, names: tuple[str, str], outputs: int, *, atoms: int, std: float
) -> ColumnParallelLinear:
    """Two column-parallel linears [outputs, D] of one input as one matrix product: a rank's rows of the first, then
    its rows of the second. Biases start at zero."""
    linear = ColumnParallelLinear(
        context.model.width,
        2 * outputs,
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


class MLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))` on x [T, B, D]; with sequence parallelism x is this rank's part of T.

    Communication per pass: one all-reduce forward and one backward; with sequence parallelism an all-gather and a
    reduce-scatter forward, two all-gathers and a reduce-scatter backward.
    """

    def __init__(self, name: str, context: Context):
        super().__init__()
        model = context.model
        atoms = axis_atoms(model.mlp_width)
        std = math.sqrt(1 / (2 if model.init == "jax" else 1) / model.width)
        self.gate_up = fused_column_linear(
            context, (f"{name}.gate", f"{name}.up"), model.mlp_width, atoms=atoms, std=std
        )
        self.down = row_linear(context, f"{name}.down", model.mlp_width, atoms=atoms)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)[0].chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate="tanh") * up)[0]

"""The gated MLP, sharded over its width (paper, sections 2.3 and 4.1)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from griffin.kernels.gated_gelu import gated_gelu
from griffin.parallel.config import axis_atoms
from griffin.parallel.context import Context
from griffin.parallel.linear import LayerStep, column_step, fused_column_linear, row_linear, row_step


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
        self.kernels = context.kernels
        self.gate_up = fused_column_linear(
            context, (f"{name}.gate", f"{name}.up"), model.mlp_width, atoms=atoms, std=std, skip_bias_add=True
        )
        self.down = row_linear(context, f"{name}.down", model.mlp_width, atoms=atoms)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated_gelu(*self.gate_up(x), backend=self.kernels))[0]

    def stepper(self) -> LayerStep:
        """The same for one token, x [D, B], with the weights as they are now."""
        gate_up, down = column_step(self.gate_up), row_step(self.down)

        def step(x: Tensor) -> Tensor:
            gate, up = gate_up(x).chunk(2)
            return down(F.gelu(gate, approximate="tanh").mul_(up))

        return step

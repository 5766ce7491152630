"""Gated MLP, sharded over its width (paper, sections 2.3 and 4.1)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from griffin.kernels.gated_gelu import gated_gelu
from griffin.parallel.config import axis_atoms
from griffin.parallel.context import Context
from griffin.parallel.layers.linear import Branch, ColumnLinear, LayerStep, RowLinear
from griffin.parallel.layers.recompute import recomputed


class MLP(nn.Module):
    """Compute the branch `down(gelu(gate(x)) * up(x))` of x [T, B, D], sharded along T with sequence parallelism.

    With `recompute` the backward pass computes the input of `down` again instead of keeping it.

    Communication per pass: one all-reduce forward and one backward; with sequence parallelism an all-gather and a
    reduce-scatter forward, one of each backward, and another all-gather there unless gathered inputs are kept.
    """

    def __init__(self, name: str, context: Context, *, recompute: bool = False):
        super().__init__()
        model = context.model
        atoms = axis_atoms(model.mlp_width)
        std = math.sqrt(1 / (2 if model.init == "jax" else 1) / model.width)
        self.kernels, self.recompute = context.kernels, recompute
        self.gate_up = ColumnLinear(context, (f"{name}.gate", f"{name}.up"), model.mlp_width, atoms=atoms, std=std)
        self.down = RowLinear(context, f"{name}.down", model.mlp_width, atoms=atoms)

    def forward(self, x: Tensor) -> Branch:
        x, bias = self.gate_up.product(x), self.gate_up.bias
        y = gated_gelu(x, bias, backend=self.kernels)
        if self.recompute:
            kept = x.detach()
            y = recomputed(y, lambda: gated_gelu(kept, bias.detach(), backend=self.kernels))
        return self.down(y)

    def stepper(self) -> LayerStep:
        """Return the MLP for one token, x [D, B], with the current weights."""
        gate_up, down = self.gate_up.stepper(), self.down.stepper()

        def step(x: Tensor) -> Tensor:
            gate, up = gate_up(x).chunk(2)
            return down(F.gelu(gate, approximate="tanh").mul_(up))

        return step

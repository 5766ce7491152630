"""Temporal mixer of the recurrent block, sharded over channels (paper, sections 2.3, 2.4 and 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from griffin.kernels.recurrent_block import Observer, recurrent_block
from griffin.kernels.rglru import rglru_step
from griffin.kernels.selection import resolve_backend
from griffin.parallel.config import CONV_WIDTH, ModelConfig
from griffin.parallel.context import Context, DecodePosition, Documents
from griffin.parallel.layers.linear import Branch, ColumnLinear, RowLinear
from griffin.parallel.mixers.base import Cost
from griffin.parallel.sharding import Piece, decay, describe, normal, zeros


class BlockDiagonalGates(nn.Module):
    """Weights of the pre-sigmoid input and recurrence gates of the RG-LRU, block-diagonal over channels.

    Blocks are sharded over tensor ranks, so no rank needs another's channels.
    """

    def __init__(self, name: str, context: Context):
        super().__init__()
        model = context.model
        blocks, width = model.gate_blocks, model.gate_block_width
        std = math.sqrt(1 / (model.recurrent_width if model.init == "jax" else width))
        held = blocks // context.grid.tensor_size
        # [block, in, (input gate | recurrence gate) out], and blocks of the input gate, then of the recurrence gate
        self.weight = context.parameter(held, width, 2 * width)
        self.bias = context.parameter(2 * held, width)
        gates = (f"{name}.input_gate", f"{name}.recurrence_gate")
        for suffix, parameter, shape, init, dim, apart in (
            ("weight", self.weight, (blocks, width, width), normal(std), 2, width),
            ("bias", self.bias, (blocks, width), zeros, 0, held),
        ):
            describe(
                parameter,
                *(
                    Piece(
                        name=f"{gate}.{suffix}",
                        shape=shape,
                        init=init,
                        axis=0,
                        atoms=blocks,
                        dim=dim,
                        start=place * apart,
                    )
                    for place, gate in enumerate(gates)
                ),
                weight_decay=False,
            )


@dataclass(frozen=True)
class RecurrentState:
    """Decoding state of a recurrent mixer for B sequences and a tensor rank's R/t channels."""

    recurrence: Tensor  # [R/t, B], float32
    window: Tensor  # [CONV_WIDTH - 1, R/t, B], the convolution's last inputs, oldest first


class RecurrentMixer(nn.Module):
    """Compute `out(RGLRU(conv(lin_x(u))) * gelu(lin_y(u)))` for u [T, B, D].

    Between the input linears and the output linear every operation is per channel or per gate block: a tensor rank
    computes its channels independently, and the mixer communicates exactly what an MLP does.
    """

    def __init__(self, name: str, context: Context, *, save_states: bool = True):
        super().__init__()
        self.kernels, self.save_states = context.kernels, save_states
        self.observe: Observer | None = None  # who looks at the gates, while somebody does
        model = context.model
        R, blocks = model.recurrent_width, model.gate_blocks
        self.lin_xy = ColumnLinear(
            context, (f"{name}.lin_x", f"{name}.lin_y"), R, atoms=blocks, std=math.sqrt(1 / model.width)
        )
        held = R // context.grid.tensor_size
        self.conv_weight = context.parameter(CONV_WIDTH, held)
        self.conv_bias = context.parameter(held)
        self.gates = BlockDiagonalGates(name, context)
        self.decay = context.parameter(held)
        self.out = RowLinear(context, f"{name}.out", R, atoms=blocks)
        describe(
            self.conv_weight,
            Piece(
                name=f"{name}.conv.weight",
                shape=(CONV_WIDTH, R),
                init=normal(math.sqrt(0.01 / CONV_WIDTH)),
                axis=1,
                atoms=blocks,
                dim=1,
            ),
            weight_decay=True,
        )
        describe(
            self.conv_bias,
            Piece(name=f"{name}.conv.bias", shape=(R,), init=zeros, axis=0, atoms=blocks),
            weight_decay=False,
        )
        describe(
            self.decay,
            Piece(name=f"{name}.decay", shape=(R,), init=decay, axis=0, atoms=blocks),
            weight_decay=False,
        )

    @classmethod
    def build(cls, name: str, context: Context, recompute: str) -> Self:
        return cls(name, context, save_states=recompute != "states")

    @staticmethod
    def cost(model: ModelConfig, sequence: int) -> Cost:
        """Return the cost: FLOPs 2 (3 D R + 2 R^2 / gate_blocks)."""
        D, R = model.width, model.recurrent_width
        # Bytes per element, forward and backward: convolution 4 + 6, and the recurrence in chunks of time 18 + 26.
        return Cost(2.0 * (3 * D * R + 2 * R * model.gate_block_width), 54.0 / 3 * R)

    def forward(self, u: Tensor, documents: Documents) -> Branch:
        return self._mix(u, documents)[0]

    def prefill(self, u: Tensor, documents: Documents, max_length: int) -> tuple[Branch, RecurrentState]:
        """Run `forward`, and also return the state after the last document of each sequence."""
        mixed, conv_input, last = self._mix(u, documents)
        length = min(CONV_WIDTH - 1, len(u))
        window = conv_input.new_zeros(CONV_WIDTH - 1, conv_input.shape[2], conv_input.shape[1])
        bias = self.lin_xy.bias[: window.shape[1]]
        window[-length:] = (conv_input[-length:] + bias).mT
        # Inputs of documents before the last one are masked.
        distance = torch.arange(CONV_WIDTH - 2, -1, -1, device=u.device)[:, None]
        window.masked_fill_((distance > documents.positions[-1])[:, None], 0)
        return mixed, RecurrentState(last.t().contiguous(), window)

    def stepper(self) -> RecurrentStep:
        return RecurrentStep(self)

    def _mix(self, u: Tensor, documents: Documents) -> tuple[Branch, Tensor, Tensor]:
        """Return the mixer's output, the convolution's input without its bias, and the recurrence's last state."""
        xy, bias = self.lin_xy.product(u), self.lin_xy.bias
        y, last = recurrent_block(
            xy,
            self.conv_weight,
            self.conv_bias,
            self.gates.weight,
            self.gates.bias.view(2, -1),
            self.decay,
            xy_bias=bias,
            starts=documents.starts,
            backend=self.kernels,
            save_states=self.save_states,
            observe=self.observe,
        )
        return self.out(y), xy.chunk(2, dim=-1)[0], last


class RecurrentStep:
    """Single-token recurrent mixer, with R/t channels in N gate blocks of w."""

    def __init__(self, mixer: RecurrentMixer):
        self._lin_xy, self._out = mixer.lin_xy.stepper(), mixer.out.stepper()
        self._taps, self._conv_bias = mixer.conv_weight[..., None], mixer.conv_bias[:, None]
        weight, bias = mixer.gates.weight.mT, mixer.gates.bias[..., None]  # [N, 2 w, w], [2 N, w, 1]
        self._gates = tuple(zip(bias.chunk(2), weight.chunk(2, dim=1), strict=True))
        self._recur = rglru_step(mixer.decay, resolve_backend(mixer.kernels, mixer.decay.device, mixer.decay.dtype))

    def prepare(self, state: RecurrentState, position: DecodePosition) -> None:
        return None

    def __call__(self, u: Tensor, state: RecurrentState, prepared: None) -> Tensor:
        x, branch = self._lin_xy(u).chunk(2)
        inputs = torch.cat((state.window, x[None]))
        state.window.copy_(inputs[1:])
        x = (inputs.float() * self._taps).sum(0).add_(self._conv_bias).to(u.dtype)
        blocks = x.view(len(self._gates[0][0]), -1, x.shape[1])  # [N, w, B]
        input_gate, recurrence_gate = (torch.baddbmm(bias, weight, blocks).view_as(x) for bias, weight in self._gates)
        return self._out(self._recur(x, input_gate, recurrence_gate, branch, state.recurrence))

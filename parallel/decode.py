"""One token at a time: the same weights as in training, with a state in the place of the tokens before.

Shapes: B sequences, D model width, H = heads/t query heads of hd, R/t channels in N gate blocks of w. A rank holds all
blocks; tensor ranks share each, as in training, and communicate where training does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional as F

from griffin.kernels.local_attention import rotation, turn
from griffin.kernels.rglru import rglru_step
from griffin.kernels.selection import resolve_backend
from griffin.parallel.block import ResidualBlock
from griffin.parallel.context import Documents
from griffin.parallel.mixers.attention import AttentionMixer, AttentionState
from griffin.parallel.mixers.recurrent import RecurrentMixer, RecurrentState
from griffin.parallel.mlp import MLP
from griffin.parallel.norm import EPSILON, RMSNorm
from griffin.parallel.stage import Stage

BlockState = RecurrentState | AttentionState
Layer = Callable[[Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]  # cosine and sine of rotary embedding, [B, hd / 4]

ROTATIONS = 64  # that are computed at once


class Slot(NamedTuple):
    """Where the keys and values of one time lie in an AttentionState."""

    place: Tensor  # int64 [1]
    filled: int  # slots that hold any by then
    visible: Tensor | None  # [B, 1, 1, filled], False where a slot holds what is before the sequence; None: nowhere


class Now(NamedTuple):
    """What all blocks ask of a token's time."""

    rotation: Rotation | None  # None without attention
    slots: dict[int, Slot]  # by the number of an AttentionState's slots


class State:
    """What a model keeps of B sequences of tokens, whose last tokens lie at one time: shorter ones begin later.

    blocks: each block's. `nbytes` does not change while sequences grow.
    """

    def __init__(self, blocks: list[BlockState], starts: Tensor, time: int, longest: int) -> None:
        self.blocks = blocks
        self.time = time  # of the tokens that come next
        self.longest = longest  # tokens that there is room for
        self.starts = starts  # int64 [B]: the time of each sequence's first token
        self._latest_start = int(starts.max())
        self._slots = {block.keys.shape[1] for block in blocks if isinstance(block, AttentionState)}
        self._rotations: list[Rotation] = []

    @property
    def nbytes(self) -> int:
        tensors = [value for block in self.blocks for value in vars(block).values()]
        return sum(tensor.nbytes for tensor in (*tensors, self.starts))

    def now(self, head_dim: int) -> Now:
        """For the tokens that come next; called once for each."""
        assert self.time < self.longest, f"there is room for {self.longest} tokens"
        if not self._slots:
            return Now(None, {})
        return Now(self._next_rotation(head_dim), {slots: self._slot(slots) for slots in self._slots})

    def _next_rotation(self, head_dim: int) -> Rotation:
        if not self._rotations:  # some are computed at a time
            times = torch.arange(self.time, self.time + ROTATIONS, device=self.starts.device)
            cos, sin = rotation(times[:, None] - self.starts, head_dim)
            self._rotations = list(zip(cos, sin, strict=True))[::-1]
        return self._rotations.pop()

    def _slot(self, slots: int) -> Slot:
        filled = min(self.time + 1, slots)
        place = torch.tensor([self.time % slots], device=self.starts.device)
        if self._latest_start <= self.time + 1 - filled:
            return Slot(place, filled, None)
        places = torch.arange(filled, device=self.starts.device)
        times = places + (self.time - places) // slots * slots  # the latest that falls on each slot
        return Slot(place, filled, (times >= self.starts[:, None])[:, None, None])


class Decoder:
    """A whole model that goes on with sequences.

    Args:
        stage: the only one of a layout without pipeline parallelism.
        compiled: let torch.compile make one program of a token's step, at the first of them and when shapes change: it
            takes seconds, and on CPUs a C++ compiler. For a model that is not sharded.
    """

    def __init__(self, stage: Stage, *, compiled: bool = False) -> None:
        assert stage.pre_process, "a part of the model"
        assert stage.post_process, "a part of the model"
        assert not stage.config.sequence_parallel, "a token is not cut"
        # megatron-core's looks whether the token is among this rank's rows.
        table = stage.embedding
        lookup = table if table.tp_group.size() > 1 else lambda tokens: F.embedding(tokens, table.weight)
        self._stage = stage
        self._embed = lambda tokens: stage.scaled(lookup(tokens))
        self._blocks = [block for block in stage.blocks if isinstance(block, ResidualBlock)]
        # torch.compile knows no tensors of inference_mode, which is faster.
        self._mode = torch.no_grad if compiled else torch.inference_mode
        with self._mode():
            self._final_norm = _norm(stage.final_norm)
            self._steps = [_BlockStep(block) for block in self._blocks]
        self._run = torch.compile(self._forward) if compiled else self._forward

    def prefill(self, prompts: list[Tensor], longest: int) -> tuple[Tensor, State]:
        """Take prompts in, all in one pass.

        Args:
            prompts: int64 [its length] each, at least one token; of any lengths.
            longest: tokens that the sequences may come to have, the longest prompt's included.

        Returns:
            This rank's part of the logits that follow each prompt, float32 [B, padded vocabulary / t], and the state.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        device = self._stage.embedding.weight.device
        tokens, starts = torch.zeros(len(prompts), width, dtype=torch.int64), width - lengths
        for row, prompt in zip(tokens, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        # What fills a row up in front of a prompt is a document of its own, which the prompt does not see.
        positions = torch.arange(width).expand(len(prompts), -1)
        positions = torch.where(positions < starts[:, None], positions, positions - starts[:, None]).to(device)
        states: list[BlockState] = []
        with self._mode():
            x, documents = self._stage.embed(tokens.to(device)), Documents(positions)
            for block in self._blocks:
                x, state = block.prefill(x, documents, longest)
                states.append(state)
            logits = self._stage.head(x[-1:])[0]
        return logits, State(states, starts.to(device), width, longest)

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """Take the next token of every sequence in, int64 [B], and change the state.

        Returns this rank's part of the logits that follow, float32 [B, padded vocabulary / t].
        """
        with self._mode():
            logits = self._run(tokens, state.now(self._stage.model.head_dim), state.blocks)
        state.time += 1
        return logits

    def _forward(self, tokens: Tensor, now: Now, blocks: list[BlockState]) -> Tensor:
        x = self._embed(tokens).t().contiguous()  # [D, B]
        for step, state in zip(self._steps, blocks, strict=True):
            x = step(x, state, now)
        return self._stage.logits.capped(torch.mm(self._stage.embedding.weight, self._final_norm(x)).t())


class _BlockStep:
    """`griffin.parallel.block.ResidualBlock` for x [D, B]: channels by sequences, so that products of a few sequences
    read weights as they lie."""

    def __init__(self, block: ResidualBlock) -> None:
        self._mixer_norm, self._mlp_norm = _norm(block.mixer_norm), _norm(block.mlp_norm)
        self._mixer: _RecurrentStep | _AttentionStep
        if isinstance(block.mixer, RecurrentMixer):
            self._mixer = _RecurrentStep(block.mixer)
        else:
            self._mixer = _AttentionStep(block.mixer)
        self._mlp = _mlp(block.mlp)

    def __call__(self, x: Tensor, state: BlockState, now: Now) -> Tensor:
        x = x + self._mixer(self._mixer_norm(x), state, now)
        return x + self._mlp(self._mlp_norm(x))


class _RecurrentStep:
    def __init__(self, mixer: RecurrentMixer) -> None:
        self._lin_xy, self._out = _column(mixer.lin_xy), _row(mixer.out)
        self._taps, self._conv_bias = mixer.conv_weight[..., None], mixer.conv_bias[:, None]
        weight, bias = mixer.gates.weight.mT, mixer.gates.bias[..., None]  # [N, 2 w, w], [N, 2 w, 1]
        self._gates = tuple(zip(bias.chunk(2, dim=1), weight.chunk(2, dim=1), strict=True))
        self._recur = rglru_step(mixer.decay, resolve_backend(mixer.kernels, mixer.decay.device, mixer.decay.dtype))

    def __call__(self, u: Tensor, state: BlockState, now: Now) -> Tensor:
        assert isinstance(state, RecurrentState)
        x, branch = self._lin_xy(u).chunk(2)
        inputs = torch.cat((state.window, x[None]))
        state.window.copy_(inputs[1:])
        x = (inputs.float() * self._taps).sum(0).add_(self._conv_bias).to(u.dtype)
        blocks = x.view(len(self._gates[0][0]), -1, x.shape[1])  # [N, w, B]
        input_gate, recurrence_gate = (torch.baddbmm(bias, weight, blocks).view_as(x) for bias, weight in self._gates)
        return self._out(self._recur(x, input_gate, recurrence_gate, branch, state.recurrence))


class _AttentionStep:
    def __init__(self, mixer: AttentionMixer) -> None:
        self._heads, self._head_dim = mixer.heads, mixer.head_dim
        self._qkv = torch.cat((mixer.query, mixer.key_value))
        self._out = _row(mixer.out)

    def __call__(self, u: Tensor, state: BlockState, now: Now) -> Tensor:
        assert isinstance(state, AttentionState)
        qkv = torch.mm(self._qkv, u).t().unflatten(-1, (-1, self._head_dim))  # [B, H + 2, hd]
        assert now.rotation is not None
        q, k = turn(qkv[:, :-1], now.rotation).split((self._heads, 1), dim=1)
        slot = now.slots[state.keys.shape[1]]
        state.keys.index_copy_(1, slot.place, k)
        state.values.index_copy_(1, slot.place, qkv[:, -1:])
        keys, values = (held[:, None, : slot.filled] for held in (state.keys, state.values))
        # All heads are queries of the one key/value head.
        attended = F.scaled_dot_product_attention(q[:, None], keys, values, attn_mask=slot.visible)  # [B, 1, H, hd]
        return self._out(attended.flatten(1).t())


def _mlp(mlp: MLP) -> Layer:
    gate_up, down = _column(mlp.gate_up), _row(mlp.down)

    def run(x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2)
        return down(F.gelu(gate, approximate="tanh").mul_(up))

    return run


def _norm(norm: RMSNorm) -> Layer:
    scale = (1.0 + norm.weight.float())[:, None]

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * wide.square().mean(0).add_(EPSILON).rsqrt_()).mul_(scale).to(x.dtype)

    return run


def _column(linear: ColumnParallelLinear | RowParallelLinear) -> Layer:
    """Of a column-parallel linear: this rank's part of the result."""
    weight, bias = linear.weight, linear.bias[:, None]
    return lambda x: torch.addmm(bias, weight, x)


def _row(linear: RowParallelLinear) -> Layer:
    """Of a row-parallel linear: the sum over tensor ranks."""
    weight, bias, group = linear.weight, linear.bias[:, None], linear.tp_group
    if group.size() == 1:
        return _column(linear)

    def run(x: Tensor) -> Tensor:
        y = torch.mm(weight, x)
        dist.all_reduce(y, group=group)
        return y.add_(bias)

    return run

"""Local and global multi-query attention, sharded over query heads (paper, sections 2.3 and 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor, nn
from torch.nn import functional as F

from griffin.kernels.local_attention import multi_query_attention
from griffin.kernels.rotary import rotary_qkv, rotation, turn
from griffin.parallel.config import ModelConfig
from griffin.parallel.context import Clock, Context, Documents
from griffin.parallel.linear import row_linear, row_step
from griffin.parallel.mixers.base import Cost
from griffin.parallel.sharding import Piece, describe, normal

Rotation = tuple[Tensor, Tensor]  # cosine and sine of rotary embedding, [B, hd / 4]

ROTATIONS = 64  # that are computed at once


@dataclass(frozen=True)
class AttentionState:
    """What an attention mixer keeps of the tokens so far of B sequences.

    Of a position t (counted alike for all sequences) keys and values lie in slot t mod S. S is the window, or the
    length to which sequences may grow where that is less or attention is global.
    """

    keys: Tensor  # [B, S, hd], rotated
    values: Tensor  # [B, S, hd]


class AttentionMixer(nn.Module):
    """Multi-query attention with rotary positions on u [T, B, D]; `window` None sees the whole document.

    A tensor rank holds its query heads and a copy of the one key/value head. Every rank computes keys and values from
    its full input for its own heads, so the activations need no further communication: only the key/value weight
    gradients are partial, and are summed over tensor ranks once per step (`sum_tensor_gradients`).
    """

    def __init__(self, name: str, context: Context, window: int | None):
        super().__init__()
        model = context.model
        self.heads = model.heads // context.grid.tensor_size
        self.head_dim = model.head_dim
        self.window = window
        self._kernels = context.kernels
        self._group = context.grid.tensor_group
        self._sequence_parallel = context.megatron.sequence_parallel
        self.query = context.parameter(self.heads * self.head_dim, model.width)
        self.key_value = context.parameter(2 * self.head_dim, model.width)
        self.out = row_linear(context, f"{name}.out", model.attention_width, atoms=model.heads)
        init = normal(math.sqrt(1 / model.width))
        describe(
            self.query,
            Piece(
                name=f"{name}.q.weight",
                shape=(model.attention_width, model.width),
                init=init,
                axis=0,
                atoms=model.heads,
            ),
            weight_decay=True,
        )
        describe(
            self.key_value,
            *(
                Piece(
                    name=f"{name}.{part}.weight",
                    shape=(self.head_dim, model.width),
                    init=init,
                    start=place * self.head_dim,
                )
                for place, part in enumerate(("k", "v"))
            ),
            weight_decay=True,
            tensor_sum=True,
        )

    def forward(self, u: Tensor, documents: Documents) -> Tensor:
        return self._attend(u, documents)[0]

    def prefill(self, u: Tensor, documents: Documents, longest: int) -> tuple[Tensor, AttentionState]:
        """As `forward`, and the state from which sequences go on, to `longest` tokens at most."""
        attended, keys, values = self._attend(u, documents)
        slots = min(longest, self.window or longest)
        return attended, AttentionState(_in_slots(keys, slots), _in_slots(values, slots))

    def stepper(self) -> AttentionStep:
        return AttentionStep(self)

    def _attend(self, u: Tensor, documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
        """The mixer's output, and its keys and values [T, B, hd]."""
        # One product for q, k and v: the input is gathered, and its gradient reduced, once.
        qkv = linear_with_grad_accumulation_and_async_allreduce(
            u,
            torch.cat((self.query, self.key_value)),
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self._group.size() > 1 and not self._sequence_parallel,
            sequence_parallel=self._sequence_parallel,
            tp_group=self._group,
        )
        q, k, v = rotary_qkv(qkv, documents.rotation(self.head_dim), self.heads, backend=self._kernels)
        return self.out(multi_query_attention(q, k, v, documents.mask(self.window)))[0], k, v


class LocalAttention(AttentionMixer):
    """Over the last `window` tokens of a document."""

    @classmethod
    def build(cls, name: str, context: Context, recompute: str) -> Self:
        return cls(name, context, context.model.window)

    @staticmethod
    def cost(model: ModelConfig, sequence: int) -> Cost:
        return attention_cost(model, sequence, model.window)


class GlobalAttention(AttentionMixer):
    """Over all earlier tokens of a document."""

    @classmethod
    def build(cls, name: str, context: Context, recompute: str) -> Self:
        return cls(name, context, None)

    @staticmethod
    def cost(model: ModelConfig, sequence: int) -> Cost:
        return attention_cost(model, sequence, None)


def attention_cost(model: ModelConfig, sequence: int, window: int | None) -> Cost:
    """FLOPs 2 (2 D H hd + 2 D hd) + 4 H hd K, with K keys that a query sees on average."""
    D, A = model.width, model.attention_width
    return Cost(2.0 * (2 * D * A + 2 * D * model.head_dim) + 4.0 * A * mean_keys(sequence, window), 8.0 * A)


def mean_keys(sequence: int, window: int | None) -> float:
    """Mean number of keys that a query of a causal sequence sees, itself included; `window` limits it."""
    reach = min(sequence, window or sequence)
    return reach - reach * (reach - 1) / (2 * sequence)


def _in_slots(x: Tensor, slots: int) -> Tensor:
    """[B, slots, hd] of x [T, B, hd]: the last positions, position t in slot t mod slots; zeros where none is."""
    length, batch, head_dim = x.shape
    first = max(0, length - slots)
    held = x.new_zeros(batch, slots, head_dim)
    held[:, torch.arange(first, length, device=x.device) % slots] = x[first:].transpose(0, 1)
    return held


class Slot(NamedTuple):
    """Where the keys and values of one time lie in an AttentionState."""

    place: Tensor  # int64 [1]
    filled: int  # slots that hold any by then
    visible: Tensor | None  # [B, 1, 1, filled], False where a slot holds what is before the sequence; None: nowhere


class AttentionStep:
    """An attention mixer for one token, with H = heads/t query heads of hd."""

    def __init__(self, mixer: AttentionMixer):
        self._heads, self._head_dim = mixer.heads, mixer.head_dim
        self._qkv = torch.cat((mixer.query, mixer.key_value))
        self._out = row_step(mixer.out)

    def now(self, state: AttentionState, clock: Clock) -> tuple[Rotation, Slot]:
        slots = state.keys.shape[1]
        rotations = clock.shared(("rotations", self._head_dim), lambda: _Rotations(self._head_dim))
        return rotations.at(clock), clock.shared(("slots", slots), lambda: _Slots(slots)).at(clock)

    def __call__(self, u: Tensor, state: AttentionState, now: tuple[Rotation, Slot]) -> Tensor:
        turned, slot = now
        qkv = torch.mm(self._qkv, u).t().unflatten(-1, (-1, self._head_dim))  # [B, H + 2, hd]
        q, k = turn(qkv[:, :-1], turned).split((self._heads, 1), dim=1)
        state.keys.index_copy_(1, slot.place, k)
        state.values.index_copy_(1, slot.place, qkv[:, -1:])
        keys, values = (held[:, None, : slot.filled] for held in (state.keys, state.values))
        # All heads are queries of the one key/value head.
        attended = F.scaled_dot_product_attention(q[:, None], keys, values, attn_mask=slot.visible)  # [B, 1, H, hd]
        return self._out(attended.flatten(1).t())


class _Rotations:
    """By which heads turn at a time; ROTATIONS times are computed at once."""

    def __init__(self, head_dim: int):
        self._head_dim = head_dim
        self._first = 0  # the time of the first of those that are held
        self._held: list[Rotation] = []

    def at(self, clock: Clock) -> Rotation:
        if not 0 <= clock.time - self._first < len(self._held):
            self._first = clock.time
            times = torch.arange(clock.time, clock.time + ROTATIONS, device=clock.starts.device)
            self._held = list(zip(*rotation(times[:, None] - clock.starts, self._head_dim), strict=True))
        return self._held[clock.time - self._first]


class _Slots:
    """Where states of so many slots hold a time; computed once for all blocks."""

    def __init__(self, slots: int):
        self._slots = slots
        self._time = -1
        self._slot: Slot

    def at(self, clock: Clock) -> Slot:
        if self._time != clock.time:
            self._time, self._slot = clock.time, self._find(clock)
        return self._slot

    def _find(self, clock: Clock) -> Slot:
        time, slots = clock.time, self._slots
        filled = min(time + 1, slots)
        place = torch.tensor([time % slots], device=clock.starts.device)
        if clock.latest_start <= time + 1 - filled:
            return Slot(place, filled, None)
        places = torch.arange(filled, device=clock.starts.device)
        times = places + (time - places) // slots * slots  # the latest that falls on each slot
        return Slot(place, filled, (times >= clock.starts[:, None])[:, None, None])

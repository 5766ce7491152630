"""Local and global multi-query attention, sharded over query heads (paper, sections 2.3 and 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from griffin.kernels.local_attention import multi_query_attention
from griffin.kernels.rotary import apply_rotary, rotary_cos_sin, rotary_qkv
from griffin.parallel.config import ModelConfig
from griffin.parallel.context import Context, DecodePosition, Documents
from griffin.parallel.layers.linear import Branch, RowLinear, column_product
from griffin.parallel.mixers.base import Cost
from griffin.parallel.sharding import Piece, describe, normal

CosSin = tuple[Tensor, Tensor]  # cosine and sine of rotary embedding, [B, hd / 4]

POSITIONS_AT_ONCE = 64  # whose rotary embeddings are computed at once


@dataclass(frozen=True)
class AttentionState:
    """Key/value cache of B sequences, a ring buffer of S slots.

    Keys and values of position index t (the same for all sequences) are in slot t mod S. S is the window, or the
    maximum length of the sequences if that is smaller or attention is global.
    """

    keys: Tensor  # [B, S, hd], rotated
    values: Tensor  # [B, S, hd]


class AttentionMixer(nn.Module):
    """Multi-query attention with rotary positions on u [T, B, D]. With `window` None a query sees its whole document.

    A tensor rank holds its query heads and a copy of the single key/value head. Every rank computes keys and values for
    its own heads from the full input, so activations need no further communication. Only the gradients of the key/value
    weights are partial; they are all-reduced over tensor ranks once per step (`sum_tensor_gradients`).
    """

    def __init__(self, name: str, context: Context, window: int | None):
        super().__init__()
        model = context.model
        self.heads = model.heads // context.grid.tensor_size
        self.head_dim = model.head_dim
        self.window = window
        self._context = context
        self.query = context.parameter(self.heads * self.head_dim, model.width)
        self.key_value = context.parameter(2 * self.head_dim, model.width)
        self.out = RowLinear(context, f"{name}.out", model.attention_width, atoms=model.heads)
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

    def forward(self, u: Tensor, documents: Documents) -> Branch:
        return self._attend(u, documents)[0]

    def prefill(self, u: Tensor, documents: Documents, max_length: int) -> tuple[Branch, AttentionState]:
        """Run `forward`, and also return the key/value cache, for sequences of up to `max_length` tokens."""
        attended, keys, values = self._attend(u, documents)
        slots = min(max_length, self.window or max_length)
        return attended, AttentionState(_in_slots(keys, slots), _in_slots(values, slots))

    def stepper(self) -> AttentionStep:
        return AttentionStep(self)

    def _attend(self, u: Tensor, documents: Documents) -> tuple[Branch, Tensor, Tensor]:
        """Return the mixer's output, and its keys and values [T, B, hd]."""
        # One matrix product for q, k and v: the input is gathered, and its gradient reduced, once.
        qkv = column_product(u, (self.query, self.key_value), self._context)
        q, k, v = rotary_qkv(qkv, documents.rotary(self.head_dim), self.heads, backend=self._context.kernels)
        mask = documents.mask(self.window, self._context.attention)
        return self.out(multi_query_attention(q, k, v, mask)), k, v


class LocalAttention(AttentionMixer):
    """Attention over the last `window` tokens of a document."""

    @classmethod
    def build(cls, name: str, context: Context, recompute: str) -> Self:
        return cls(name, context, context.model.window)

    @staticmethod
    def cost(model: ModelConfig, sequence: int) -> Cost:
        return attention_cost(model, sequence, model.window)


class GlobalAttention(AttentionMixer):
    """Attention over all earlier tokens of a document."""

    @classmethod
    def build(cls, name: str, context: Context, recompute: str) -> Self:
        return cls(name, context, None)

    @staticmethod
    def cost(model: ModelConfig, sequence: int) -> Cost:
        return attention_cost(model, sequence, None)


def attention_cost(model: ModelConfig, sequence: int, window: int | None) -> Cost:
    """Return the cost: FLOPs 2 (2 D H hd + 2 D hd) + 4 H hd K, with K the mean number of keys that a query sees."""
    D, A = model.width, model.attention_width
    # Bytes per element, forward and backward: rotary embedding 4 + 4, attention 4 + 12, of keys and values 2 + 4.
    flops = 2.0 * (2 * D * A + 2 * D * model.head_dim) + 4.0 * A * mean_keys(sequence, window)
    return Cost(flops, (24.0 * A + 14.0 * 2 * model.head_dim) / 3)


def mean_keys(sequence: int, window: int | None) -> float:
    """Return the mean number of keys that a query of a causal sequence sees within `window`, its own included."""
    reach = min(sequence, window or sequence)
    return reach - reach * (reach - 1) / (2 * sequence)


def _in_slots(x: Tensor, slots: int) -> Tensor:
    """Return [B, slots, hd] with the last positions of x [T, B, hd], position t in slot t mod slots, else zeros."""
    length, batch, head_dim = x.shape
    first = max(0, length - slots)
    held = x.new_zeros(batch, slots, head_dim)
    held[:, torch.arange(first, length, device=x.device) % slots] = x[first:].transpose(0, 1)
    return held


class CacheSlot(NamedTuple):
    """Slot of an AttentionState for the keys and values of one position."""

    number: Tensor  # int64 [1]
    filled: int  # slots in use, this one included
    mask: Tensor | None  # [B, 1, 1, filled], False for slots from before the sequence's start; None if there are none


class AttentionStep:
    """Single-token attention mixer, with H = heads/t query heads of hd."""

    def __init__(self, mixer: AttentionMixer):
        self._heads, self._head_dim = mixer.heads, mixer.head_dim
        self._qkv = torch.cat((mixer.query, mixer.key_value))
        self._out = mixer.out.stepper()

    def prepare(self, state: AttentionState, position: DecodePosition) -> tuple[CosSin, CacheSlot]:
        slots = state.keys.shape[1]
        rotary_cache = position.cached(("rotary", self._head_dim), lambda: _RotaryCache(self._head_dim))
        slot_cache = position.cached(("slots", slots), lambda: _SlotCache(slots))
        return rotary_cache.at(position), slot_cache.at(position)

    def __call__(self, u: Tensor, state: AttentionState, prepared: tuple[CosSin, CacheSlot]) -> Tensor:
        cos_sin, slot = prepared
        qkv = torch.mm(self._qkv, u).t().unflatten(-1, (-1, self._head_dim))  # [B, H + 2, hd]
        q, k = apply_rotary(qkv[:, :-1], cos_sin).split((self._heads, 1), dim=1)
        state.keys.index_copy_(1, slot.number, k)
        state.values.index_copy_(1, slot.number, qkv[:, -1:])
        keys, values = (held[:, None, : slot.filled] for held in (state.keys, state.values))
        # All heads are queries of the single key/value head.
        attended = F.scaled_dot_product_attention(q[:, None], keys, values, attn_mask=slot.mask)  # [B, 1, H, hd]
        return self._out(attended.flatten(1).t())


class _RotaryCache:
    """Rotary embeddings of the next positions, computed POSITIONS_AT_ONCE at a time and shared by all blocks."""

    def __init__(self, head_dim: int):
        self._head_dim = head_dim
        self._first = 0  # index of the first cached position
        self._cos_sin: list[CosSin] = []

    def at(self, position: DecodePosition) -> CosSin:
        if not 0 <= position.index - self._first < len(self._cos_sin):
            self._first = position.index
            indices = torch.arange(position.index, position.index + POSITIONS_AT_ONCE, device=position.starts.device)
            self._cos_sin = list(zip(*rotary_cos_sin(indices[:, None] - position.starts, self._head_dim), strict=True))
        return self._cos_sin[position.index - self._first]


class _SlotCache:
    """The current position's slot in states of a given number of slots, computed once for all blocks."""

    def __init__(self, slots: int):
        self._slots = slots
        self._index = -1
        self._slot: CacheSlot

    def at(self, position: DecodePosition) -> CacheSlot:
        if self._index != position.index:
            self._index, self._slot = position.index, self._find(position)
        return self._slot

    def _find(self, position: DecodePosition) -> CacheSlot:
        index, slots = position.index, self._slots
        filled = min(index + 1, slots)
        slot = torch.tensor([index % slots], device=position.starts.device)
        if position.latest_start <= index + 1 - filled:
            return CacheSlot(slot, filled, None)
        held = torch.arange(filled, device=position.starts.device)
        indices = held + (index - held) // slots * slots  # the latest position index in each slot
        return CacheSlot(slot, filled, (indices >= position.starts[:, None])[:, None, None])

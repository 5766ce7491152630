"""Attention with PyTorch's FlexAttention, which skips fully masked blocks of scores: the backend for GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from griffin.kernels.local_attention.groups import key_value_groups, repeated
from griffin.kernels.triton_launch import multiprocessors

MIN_HEAD_DIM = 16  # of FlexAttention's CUDA kernels; smaller heads are padded with zeros


@dataclass(frozen=True)
class FlexMask:
    """The blocks of scores that are computed, of documents [B, T] and a window."""

    blocks: BlockMask
    window: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)"""
        return self.blocks.shape[0], self.blocks.shape[-1]


@cache
def _compiled(function):
    # Uncompiled, both FlexAttention and create_block_mask materialise all T x T scores. Compiled lazily: it takes
    # seconds, and a process without a GPU never needs it.
    return torch.compile(function)


def flex_mask(documents: Tensor, window: int | None) -> FlexMask:
    """Return the mask for documents [B, T]: queries see `window` keys, or with None all of their document so far."""

    def visible(batch, head, query, key):
        seen = (query >= key) & (documents[batch, query] == documents[batch, key])
        return seen if window is None else seen & (query - key < window)

    rows, length = documents.shape
    build = _compiled(create_block_mask) if documents.is_cuda else create_block_mask
    return FlexMask(build(visible, rows, None, length, length, device=documents.device), window)


def flex_attention_mqa(q: Tensor, k: Tensor, v: Tensor, mask: FlexMask, groups: int | None = None) -> Tensor:
    """Return attention [T, B, H * hd] of q [T, B, H, hd] over k, v [T, B, hd]. No backward on CPUs.

    Keys and values are repeated for `groups` groups of query heads, by default as `key_value_groups` says.
    """
    attend = _compiled(flex_attention) if q.is_cuda else flex_attention
    length, batch, heads, head_dim = q.shape
    if groups is None:
        groups = key_value_groups(batch, heads, length, mask.window, head_dim, multiprocessors(q.device))
    if head_dim < MIN_HEAD_DIM:
        q, k, v = (F.pad(tensor, (0, MIN_HEAD_DIM - head_dim)) for tensor in (q, k, v))
    attended = attend(
        q.permute(1, 2, 0, 3),
        repeated(k, groups),
        repeated(v, groups),
        block_mask=mask.blocks,
        scale=head_dim**-0.5,
        enable_gqa=True,
    )
    return attended[..., :head_dim].permute(2, 0, 1, 3).flatten(2)

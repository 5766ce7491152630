"""Attention with PyTorch's FlexAttention, which skips fully masked blocks of scores: the backend for GPUs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

MIN_HEAD_DIM = 16  # of FlexAttention's CUDA kernels; smaller heads are padded with zeros


@cache
def _compiled(function):
    # Uncompiled, both FlexAttention and create_block_mask materialise all T x T scores. Compiled lazily: it takes
    # seconds, and a process without a GPU never needs it.
    return torch.compile(function)


def flex_mask(documents: Tensor, window: int | None) -> BlockMask:
    """Return the mask for documents [B, T]: queries see `window` keys, or with None all of their document so far."""

    def visible(batch, head, query, key):
        seen = (query >= key) & (documents[batch, query] == documents[batch, key])
        return seen if window is None else seen & (query - key < window)

    rows, length = documents.shape
    build = _compiled(create_block_mask) if documents.is_cuda else create_block_mask
    return build(visible, rows, None, length, length, device=documents.device)


def flex_attention_mqa(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Return attention [T, B, H * hd] of q [T, B, H, hd] over k, v [T, B, hd]. No backward on CPUs."""
    attend = _compiled(flex_attention) if q.is_cuda else flex_attention
    head_dim = q.shape[-1]
    if head_dim < MIN_HEAD_DIM:
        q, k, v = (F.pad(tensor, (0, MIN_HEAD_DIM - head_dim)) for tensor in (q, k, v))
    keys, values = (tensor.transpose(0, 1).unsqueeze(1) for tensor in (k, v))  # [B, 1, T, hd]
    attended = attend(q.permute(1, 2, 0, 3), keys, values, block_mask=mask, scale=head_dim**-0.5, enable_gqa=True)
    return attended[..., :head_dim].permute(2, 0, 1, 3).flatten(2)

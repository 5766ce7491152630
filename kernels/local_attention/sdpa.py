"""Attention over blocks of queries with PyTorch's scaled_dot_product_attention: the backend for CPUs.

Query blocks are as long as the window, so a block sees only its own keys and the previous block's, and time and memory
grow with T x W. Blocks are slices of the sequence, not padded copies: T need not be a multiple of the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class BlockedMask:
    """Boolean mask of the keys that each query sees, per block of queries.

    blocks: per block [B, 1, Q, K] bool. The K keys of a block are those of the previous block and its own.
    """

    blocks: tuple[Tensor, ...]

    @property
    def block(self) -> int:
        """Queries per block; the last block may have fewer."""
        return self.blocks[0].shape[2]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)"""
        return self.blocks[0].shape[0], sum(visible.shape[2] for visible in self.blocks)


def blocked_mask(documents: Tensor, window: int | None) -> BlockedMask:
    """Return the mask for documents [B, T]: queries see `window` keys, or with None all of their document so far."""
    length = documents.shape[1]
    block = length if window is None else min(window, length)
    time = torch.arange(length, device=documents.device)
    blocks = []
    for first in range(0, length, block):
        queries, keys = slice(first, first + block), slice(max(0, first - block), first + block)
        distance = time[queries, None] - time[keys]
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        same_document = documents[:, queries, None] == documents[:, None, keys]
        blocks.append((visible & same_document).unsqueeze(1))
    return BlockedMask(tuple(blocks))


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockedMask) -> Tensor:
    """Return attention [T, B, H * hd] of q [T, B, H, hd] over k, v [T, B, hd]."""
    q_blocks, k_blocks, v_blocks = (tensor.split(mask.block) for tensor in (q, k, v))
    outputs = []
    for index, (queries, visible) in enumerate(zip(q_blocks, mask.blocks, strict=True)):
        near = slice(max(0, index - 1), index + 1)
        keys, values = (torch.cat(blocks[near]).transpose(0, 1).unsqueeze(1) for blocks in (k_blocks, v_blocks))
        attended = F.scaled_dot_product_attention(
            queries.permute(1, 2, 0, 3), keys, values, attn_mask=visible, enable_gqa=True
        )  # [B, H, Q, hd]
        outputs.append(attended.permute(2, 0, 1, 3).flatten(2))
    return torch.cat(outputs)

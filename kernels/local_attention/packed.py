"""Attention of functions that take documents packed one after the other: [tokens, heads, hd] and where each begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Offsets:
    """Where the documents of a batch [B, T] begin, its sequences one after the other.

    cu_seqlens: int32 [N + 1], the first token of each document, ascending. The last ones are B T, as those of documents
        without tokens: N is a power of two, so that few different shapes arise. It is no larger than that, because
        FlashAttention's backward takes memory for each document.
    max_seqlen: tokens of the longest document.
    """

    cu_seqlens: Tensor
    max_seqlen: int


# Attention [tokens, H, hd] of q [tokens, H, hd] over k, v [tokens, 1, hd] within documents and a window.
Attend = Callable[[Tensor, Tensor, Tensor, Offsets, int | None], Tensor]


@dataclass(frozen=True)
class PackedMask:
    """Documents [B, T] and a window, and the function that computes attention within them."""

    shape: tuple[int, int]
    offsets: Offsets
    window: int | None
    attend: Attend


def document_offsets(starts: Tensor) -> Offsets:
    """Return the offsets of documents whose first tokens are marked in `starts`, bool [B, T] on the CPU.

    The first token of a sequence begins a document in any case.
    """
    assert starts.device.type == "cpu", "reading offsets of a GPU's tensor would wait for the GPU"
    starts = starts.clone()
    starts[:, 0] = True
    first = starts.flatten().nonzero().squeeze(1)
    tokens = torch.tensor([starts.numel()])
    max_seqlen = int(torch.cat((first, tokens)).diff().max())
    slots = 1 << (len(first) - 1).bit_length()
    return Offsets(torch.cat((first, tokens.expand(slots + 1 - len(first)))).int(), max_seqlen)


def offsets_of(documents: Tensor) -> Offsets:
    """Return the offsets of documents by id, [B, T], on their device. Waits for a GPU."""
    starts = torch.zeros(documents.shape, dtype=torch.bool)
    starts[:, 1:] = documents.diff(dim=1).cpu() != 0
    found = document_offsets(starts)
    return Offsets(found.cu_seqlens.to(documents.device), found.max_seqlen)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, mask: PackedMask) -> Tensor:
    """Return attention [T, B, H * hd] of q [T, B, H, hd] over k, v [T, B, hd]."""
    length, batch = q.shape[:2]
    # Copies, unless there is a single sequence: the tokens of a sequence are to follow each other.
    queries, keys, values = (x.transpose(0, 1).flatten(0, 1) for x in (q, k.unsqueeze(2), v.unsqueeze(2)))
    attended = mask.attend(queries, keys, values, mask.offsets, mask.window)
    return attended.unflatten(0, (batch, length)).transpose(0, 1).flatten(2)

"""Local and global multi-query attention over packed documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from griffin.kernels.backends import ATTENTION_BACKENDS, AUTO
from griffin.kernels.local_attention.counted import CountedMask, counted_attention, counted_mask
from griffin.kernels.local_attention.flash import flash_attention
from griffin.kernels.local_attention.flex import FlexMask, flex_attention_mqa, flex_mask
from griffin.kernels.local_attention.packed import (
    Attend,
    Offsets,
    PackedMask,
    document_offsets,
    offsets_of,
    packed_attention,
)
from griffin.kernels.local_attention.sdpa import BlockedMask, blocked_mask, sdpa_attention
from griffin.kernels.local_attention.selection import COUNTED, resolve_backend
from griffin.kernels.local_attention.varlen import varlen_attention

__all__ = [
    "AttentionMask",
    "Offsets",
    "attention_mask",
    "document_offsets",
    "multi_query_attention",
    "resolve_backend",
    "select_backend",
]

AttentionMask = FlexMask | BlockedMask | PackedMask | CountedMask
MASKS: dict[str, Callable[[Tensor, int | None], AttentionMask]] = {
    "flex": flex_mask,
    "sdpa": blocked_mask,
    COUNTED: counted_mask,
}
PACKED: dict[str, Attend] = {"flash": flash_attention, "varlen": varlen_attention}


def select_backend(device: torch.device) -> str:
    """Return the backend for "auto": "flex" on CUDA devices, else "sdpa", and "counted" for meta tensors.

    These run in any dtype and for any size of heads; `resolve_backend` chooses by dtype and size too.
    """
    return {"cuda": "flex", "meta": COUNTED}.get(device.type, "sdpa")


def attention_mask(
    documents: Tensor, window: int | None, *, backend: str = AUTO, offsets: Offsets | None = None
) -> AttentionMask:
    """Build the mask that says which keys each query sees. All layers of a micro-batch share it.

    A query sees the keys of its own document at its own and earlier positions; with a window W, the last W of them
    including its own (arXiv 2402.19427, section 2.3). On CPUs the mask takes B x T x 2 W bytes, or B x T x T without a
    window.

    Args:
        documents: [B, T] integer document ids, non-decreasing along T.
        window: W, or None for global attention.
        backend: "flash" (FlashAttention 3), "varlen" (PyTorch's varlen_attn), "flex" (FlexAttention; no backward on
            CPUs), "sdpa", "counted" (meta tensors only), or "auto", which selects by `select_backend`. The first two
            need a GPU, dtype and head size for which `resolve_backend` accepts them.
        offsets: of the documents, for "flash" and "varlen". They are on the device of `documents`. If None they are
            found, which waits for a GPU.

    Raises:
        ValueError: wrong shape or dtype of documents, a window below 1, or a backend that is unknown or needs a GPU.
    """
    if documents.ndim != 2 or documents.numel() == 0 or documents.dtype.is_floating_point:
        raise ValueError(f"documents: shape {list(documents.shape)}, {documents.dtype}; accepted: integers [B, T]")
    if window is not None and window < 1:
        raise ValueError(f"window: {window}; accepted: None or at least 1")
    if backend == AUTO:
        backend = select_backend(documents.device)
    if backend in PACKED:
        if documents.device.type == "cpu":
            raise ValueError(f"backend: {backend!r} on cpu; accepted on a GPU")
        rows, length = documents.shape
        return PackedMask((rows, length), offsets or offsets_of(documents), window, PACKED[backend])
    if backend not in MASKS:
        accepted = ", ".join(map(repr, (AUTO, *ATTENTION_BACKENDS, COUNTED)))
        raise ValueError(f"backend: {backend!r}; accepted: {accepted}")
    return MASKS[backend](documents, window)


def multi_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Compute attention of H query heads over one key/value head (arXiv 2402.19427, sections 2.3 and 3.1).

    Scores are scaled by hd^-1/2; the softmax is float32 (float64 if q is). Time and memory grow with T x W.

    Args:
        q: [T, B, H, hd], floating point, with any strides.
        k, v: [T, B, hd], dtype of q.
        mask: from `attention_mask` for documents [B, T].

    Returns:
        [T, B, H * hd], dtype of q.

    Raises:
        ValueError: a shape, dtype or device does not match q.
    """
    if q.ndim != 4:
        raise ValueError(f"q: shape {list(q.shape)}; accepted: [T, B, H, hd]")
    length, batch, _, head_dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != (length, batch, head_dim):
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}; q of shape {list(q.shape)} needs {[length, batch, head_dim]}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}; q is {q.dtype} on {q.device}")
    if mask.shape != (batch, length):
        raise ValueError(f"mask: of documents {list(mask.shape)}; q of shape {list(q.shape)} needs {[batch, length]}")
    if isinstance(mask, PackedMask):
        return packed_attention(q, k, v, mask)
    if isinstance(mask, FlexMask):
        return flex_attention_mqa(q, k, v, mask)
    if isinstance(mask, CountedMask):
        return counted_attention(q, k, v, mask)
    return sdpa_attention(q, k, v, mask)

"""Local and global multi-query attention over packed documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from griffin.kernels.local_attention.counted import CountedMask, counted_attention, counted_mask
from griffin.kernels.local_attention.flex import FlexMask, flex_attention_mqa, flex_mask
from griffin.kernels.local_attention.sdpa import BlockedMask, blocked_mask, sdpa_attention

__all__ = ["AttentionMask", "attention_mask", "multi_query_attention", "select_backend"]

AttentionMask = FlexMask | BlockedMask | CountedMask
BACKENDS: dict[str, Callable[[Tensor, int | None], AttentionMask]] = {
    "flex": flex_mask,
    "sdpa": blocked_mask,
    "counted": counted_mask,
}


def select_backend(device: torch.device) -> str:
    """Return the backend for "auto": "flex" on CUDA devices, else "sdpa", and "counted" for meta tensors."""
    return {"cuda": "flex", "meta": "counted"}.get(device.type, "sdpa")


def attention_mask(documents: Tensor, window: int | None, *, backend: str = "auto") -> AttentionMask:
    """Build the mask that says which keys each query sees. All layers of a micro-batch share it.

    A query sees the keys of its own document at its own and earlier positions; with a window W, the last W of them
    including its own (arXiv 2402.19427, section 2.3). On CPUs the mask takes B x T x 2 W bytes, or B x T x T without a
    window.

    Args:
        documents: [B, T] integer document ids, non-decreasing along T.
        window: W, or None for global attention.
        backend: "flex" (FlexAttention; no backward on CPUs), "sdpa", "counted" (meta tensors only), or "auto", which
            selects by `select_backend`.

    Raises:
        ValueError: wrong shape or dtype of documents, a window below 1, or an unknown backend.
    """
    if documents.ndim != 2 or documents.numel() == 0 or documents.dtype.is_floating_point:
        raise ValueError(f"documents: shape {list(documents.shape)}, {documents.dtype}; accepted: integers [B, T]")
    if window is not None and window < 1:
        raise ValueError(f"window: {window}; accepted: None or at least 1")
    if backend == "auto":
        backend = select_backend(documents.device)
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; accepted: 'auto', {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[backend](documents, window)


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
    if isinstance(mask, FlexMask):
        return flex_attention_mqa(q, k, v, mask)
    if isinstance(mask, CountedMask):
        return counted_attention(q, k, v, mask)
    return sdpa_attention(q, k, v, mask)

"""Multi-query attention, local or global, over packed documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from griffin.kernels.local_attention.flex import flex_attention_mqa, flex_mask
from griffin.kernels.local_attention.sdpa import BlockedMask, blocked_mask, sdpa_attention

__all__ = ["AttentionMask", "attention_mask", "multi_query_attention", "select_backend"]

AttentionMask = BlockMask | BlockedMask
BACKENDS: dict[str, Callable[[Tensor, int | None], AttentionMask]] = {"flex": flex_mask, "sdpa": blocked_mask}


def select_backend(device: torch.device) -> str:
    """The backend that `backend="auto"` uses for tensors on `device`: "flex" on CUDA, else "sdpa"."""
    return "flex" if device.type == "cuda" else "sdpa"


def attention_mask(documents: Tensor, window: int | None, *, backend: str = "auto") -> AttentionMask:
    """What all layers' attention over one micro-batch shares: which keys each query sees. Build it once.

    A query sees the keys of its own document at its own and earlier positions; with a window W, W of them counting its
    own (arXiv 2402.19427, section 2.3). On CPU its memory is B x T x 2 W bytes, B x T x T with no window.

    Args:
        documents: [B, T] integers, non-decreasing along T; tokens of one document have the same number.
        window: W, or None for global attention.
        backend: "flex" (FlexAttention; on CPU without backward), "sdpa", or "auto" for what `select_backend` says.

    Raises:
        ValueError: documents is not as above in shape or dtype, the window is below 1, or the backend is unknown.
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
    """Attention of H query heads over one key/value head (arXiv 2402.19427, sections 2.3 and 3.1).

    Scores are scaled by hd^-1/2; the softmax is float32 (float64 where q is). Time and memory grow with T x W.

    Args:
        q: [T, B, H, hd], floating point, of any strides.
        k, v: [T, B, hd], dtype of q.
        mask: from `attention_mask`, of documents [B, T].

    Returns:
        [T, B, H * hd], dtype of q.

    Raises:
        ValueError: a shape, dtype or device does not fit q.
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
    masked = (mask.shape[0], mask.shape[-1])
    if masked != (batch, length):
        raise ValueError(f"mask: of documents {list(masked)}; q of shape {list(q.shape)} needs {[batch, length]}")
    if isinstance(mask, BlockMask):
        return flex_attention_mqa(q, k, v, mask)
    return sdpa_attention(q, k, v, mask)

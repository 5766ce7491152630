"""Attention with FlashAttention 3, the package `flash_attn_interface`, for Hopper GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from griffin.kernels.local_attention.packed import Offsets

# Its deterministic backward does not run for heads that it pads to 256.
DETERMINISTIC_HEAD_DIM = 192


@cache
def library() -> Callable[..., Any] | None:
    """Return `flash_attn_varlen_func`, or None if the package cannot be imported or lacks it."""
    try:
        return import_module("flash_attn_interface").flash_attn_varlen_func
    except (ImportError, OSError, AttributeError):  # OSError: its compiled part does not fit this PyTorch
        return None


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Offsets, window: int | None, function: Callable[..., Any] | None = None
) -> Tensor:
    """Return attention [tokens, H, hd]; see `packed.Attend`. `function` takes the place of `flash_attn_varlen_func`.

    Gradients are bitwise reproducible for heads of up to DETERMINISTIC_HEAD_DIM dims.
    """
    attend = function or library()
    assert attend is not None, "the backend was not checked"
    result = attend(
        q,
        k,
        v,
        cu_seqlens_q=offsets.cu_seqlens,
        cu_seqlens_k=offsets.cu_seqlens,
        max_seqlen_q=offsets.max_seqlen,
        max_seqlen_k=offsets.max_seqlen,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
        # Keys to the left of the query's own, which a window includes here.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=q.shape[-1] <= DETERMINISTIC_HEAD_DIM,
    )
    return result[0] if isinstance(result, tuple) else result  # earlier versions also return the log-sum-exp

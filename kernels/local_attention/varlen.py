"""Attention with PyTorch's `varlen_attn`: FlashAttention 2 for NVIDIA GPUs from compute capability 8.0 on.

Gradients are bitwise reproducible only after `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import Tensor

from griffin.kernels.local_attention.packed import Offsets

NEEDED = {"window_size", "enable_gqa"}  # arguments that older versions lack


@cache
def library() -> Callable[..., Tensor] | None:
    """Return `varlen_attn`, or None if this version of PyTorch has none with windows and grouped heads."""
    try:
        function = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    return function if inspect.signature(function).parameters.keys() >= NEEDED else None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Offsets, window: int | None, function: Callable[..., Tensor] | None = None
) -> Tensor:
    """Return attention [tokens, H, hd]; see `packed.Attend`. `function` takes the place of `varlen_attn`."""
    attend = function or library()
    assert attend is not None, "the backend was not checked"
    return attend(
        q,
        k,
        v,
        offsets.cu_seqlens,
        offsets.cu_seqlens,
        offsets.longest,
        offsets.longest,
        scale=q.shape[-1] ** -0.5,
        # Keys to the left of the query's own, which a window includes here; none to the right.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )

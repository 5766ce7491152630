"""Attention with PyTorch's `varlen_attn`: FlashAttention 2 for NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
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
    """Return attention [tokens, H, hd]; see `packed.Attend`. `function` takes the place of `varlen_attn`.

    Gradients are bitwise reproducible.
    """
    attend = function or library()
    assert attend is not None, "the backend was not checked"
    attended = attend(
        q,
        k,
        v,
        offsets.cu_seqlens,
        offsets.cu_seqlens,
        offsets.max_seqlen,
        offsets.max_seqlen,
        scale=q.shape[-1] ** -0.5,
        # Keys to the left of the query's own, which a window includes here; none to the right.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    _make_deterministic(attended)
    return attended


def _make_deterministic(attended: Tensor) -> None:
    """Have the backward that computes from `attended` run in PyTorch's deterministic mode.

    Otherwise it adds up gradients of queries by atomic operations, in any order. It reads the mode when it runs.
    """
    node = attended.grad_fn
    if node is None:
        return
    before: list[int] = []

    def enter(_grads: object) -> None:
        before.append(torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("error")

    def leave(_inputs: object, _outputs: object) -> None:
        torch.set_deterministic_debug_mode(before.pop())

    node.register_prehook(enter)
    node.register_hook(leave)

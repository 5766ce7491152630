"""Rotary embedding in PyTorch operations that write results in place, for any device, optimised for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `griffin.kernels.rotary.ops.forward`."""
    given = qkv.unflatten(-1, (heads + 2, -1))
    steps, batch, _, head_dim = given.shape
    q = qkv.new_empty(steps, batch, heads, head_dim)
    k = qkv.new_empty(steps, batch, head_dim)
    _turn(given[:, :, :heads], cos, sin, q)
    _turn(given[:, :, heads : heads + 1], cos, sin, k.unsqueeze(2))
    return q, k, given[:, :, heads + 1].clone(memory_format=torch.contiguous_format)


def backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `griffin.kernels.rotary.ops.backward`."""
    steps, batch, heads, head_dim = grad_q.shape
    grad_qkv = grad_q.new_empty(steps, batch, (heads + 2) * head_dim)
    grads = grad_qkv.unflatten(-1, (heads + 2, head_dim))
    back = -sin
    _turn(grad_q, cos, back, grads[:, :, :heads])
    _turn(grad_k.unsqueeze(2), cos, back, grads[:, :, heads : heads + 1])
    grads[:, :, heads + 1] = grad_v
    return grad_qkv


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate heads x [T, B, H, hd] into `out`."""
    quarter = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second, rest = x.split((quarter, quarter, 2 * quarter), dim=-1)
    out_first, out_second, out_rest = out.split((quarter, quarter, 2 * quarter), dim=-1)
    if out.dtype == cos.dtype:
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    else:
        first, second = first.to(cos.dtype), second.to(cos.dtype)
        out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
        out_second.copy_((second * cos).addcmul_(first, sin))
    out_rest.copy_(rest)

"""Rotary embedding by Triton programs: one forward, one backward."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from griffin.kernels.rotary import programs
from griffin.kernels.triton_launch import launch_grid

TILE, WARPS = 1024, 4  # elements of a quarter of the heads of a program


def _start(program: Any, heads: int, cos: Tensor, like: Tensor, **others: Any) -> None:
    steps, batch, quarter = cos.shape
    block = 2 ** math.ceil(math.log2(quarter))
    rows = max(1, TILE // block)
    sizes = {"N": steps * batch, "B": batch, "H": heads, "Q": quarter, "ROWS": rows, "QUARTER": block}
    count = math.ceil(steps * batch * (heads + 2) / rows)
    if count:
        launch_grid(program, count, {"cos": cos, **sizes, **others}, like, warps=WARPS)


def forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `griffin.kernels.rotary.ops.forward`."""
    steps, batch, quarter = cos.shape
    q = qkv.new_empty(steps, batch, heads, 4 * quarter)
    k, v = (qkv.new_empty(steps, batch, 4 * quarter) for _ in range(2))
    results = {"q": q, "k": k, "v": v}
    _start(programs.rotary_forward, heads, cos, qkv, qkv=qkv, sin=sin, qkv_n=qkv.stride(1), **results)
    return q, k, v


def backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `griffin.kernels.rotary.ops.backward`."""
    steps, batch, heads, head_dim = grad_q.shape
    grad_qkv = grad_q.new_empty(steps, batch, (heads + 2) * head_dim)
    grads = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    strides = {
        f"{name}_{axis}": grad.stride(place)
        for name, grad in grads.items()
        for place, axis in enumerate("tbh"[: grad.ndim - 1])
    }
    _start(programs.rotary_backward, heads, cos, grad_q, sin=sin, grad_qkv=grad_qkv, **grads, **strides)
    return grad_qkv

"""The causal depthwise convolution of width 4 by Triton programs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from griffin.kernels.conv1d import programs
from griffin.kernels.launch import BLOCK, launch, multiprocessors
from griffin.kernels.layout import like, rows, strides

UNROLL, STAGES = 8, 4  # steps of a round, and rounds on the way
SPREAD = 8  # programs for each multiprocessor
# Each chunk reads three steps of its neighbour again, and writes its own sums.
SHORTEST_CHUNK, LONGEST_CHUNK = 64, 256


def _chunk(x: Tensor) -> int:
    steps, batch, width = x.shape
    spread = SPREAD * multiprocessors(x.device) / (batch * math.ceil(width / BLOCK))
    return UNROLL * math.ceil(min(max(steps / spread, SHORTEST_CHUNK), LONGEST_CHUNK) / UNROLL)


def _launch(program: Any, tensors: dict[str, Tensor | None], others: dict[str, Any]) -> None:
    """`tensors` are those [T, B, R] that are given with their strides, x among them."""
    x = tensors["x"]
    assert x is not None
    steps, batch, width = x.shape
    chunk = _chunk(x)
    sizes = {"T": steps, "B": batch, "R": width, "L": chunk, "UNROLL": UNROLL, "STAGES": STAGES}
    present = {f"HAS_{name.upper()}": tensors[name] is not None for name in ("starts", "window")}
    launch(program, math.ceil(steps / chunk), {**tensors, **others, **sizes, **present, **strides(tensors)}, x)


def forward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, window: Tensor | None) -> Tensor:
    """As `griffin.kernels.conv1d.ops.forward`."""
    window = None if window is None else rows(window)
    tensors = {"x": rows(x), "starts": starts, "window": window, "y": like(x)}
    _launch(programs.conv_forward, tensors, {"weight": weight.contiguous(), "bias": bias.contiguous()})
    return tensors["y"]  # type: ignore[return-value]


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, starts: Tensor | None, window: Tensor | None, grad_x: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `griffin.kernels.conv1d.ops.backward`."""
    window = None if window is None else rows(window)
    grad_y, dense_grad_x = rows(grad_y), rows(grad_x)
    grad_window = None if window is None else window.new_empty(window.shape, dtype=torch.float32)
    sums = x.new_empty((math.ceil(len(x) / _chunk(x)), x.shape[1], programs.WIDTH + 1, x.shape[2]), dtype=torch.float32)
    tensors = {"x": rows(x), "starts": starts, "window": window, "grad": grad_y, "grad_x": dense_grad_x}
    others = {"weight": weight.contiguous(), "grad_y": grad_y, "grad_window": grad_window, "grad_sums": sums}
    _launch(programs.conv_backward, tensors, others)
    total = sums.sum((0, 1))  # in a fixed order: two runs give the same bits
    if dense_grad_x is not grad_x:
        grad_x.copy_(dense_grad_x)
    return total[:-1], total[-1].clone(), grad_window

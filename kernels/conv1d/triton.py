"""Causal depthwise convolution of width 4 with Triton programs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from griffin.kernels.conv1d import programs
from griffin.kernels.memory_layout import dense_channels, dense_like, stride_arguments
from griffin.kernels.triton_launch import BLOCK, launch, multiprocessors

UNROLL, STAGES = 8, 4  # steps unrolled in a round, and pipeline stages (rounds)
TARGET_PROGRAMS = 8  # programs per multiprocessor
# Each chunk rereads three steps of its neighbour, and writes its own sums.
MIN_CHUNK, MAX_CHUNK = 64, 256


def _chunk(x: Tensor) -> int:
    steps, batch, width = x.shape
    spread = TARGET_PROGRAMS * multiprocessors(x.device) / (batch * math.ceil(width / BLOCK))
    return UNROLL * math.ceil(min(max(steps / spread, MIN_CHUNK), MAX_CHUNK) / UNROLL)


def _launch(program: Any, tensors: dict[str, Tensor | None], others: dict[str, Any]) -> None:
    """Launch a program. `tensors` [T, B, R], which include x, are passed with their strides."""
    x = tensors["x"]
    assert x is not None
    steps, batch, width = x.shape
    chunk = _chunk(x)
    sizes = {"T": steps, "B": batch, "R": width, "L": chunk, "UNROLL": UNROLL, "STAGES": STAGES}
    present = {f"HAS_{name.upper()}": tensors[name] is not None for name in ("starts", "window")}
    launch(program, math.ceil(steps / chunk), {**tensors, **others, **sizes, **present, **stride_arguments(tensors)}, x)


def forward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, window: Tensor | None) -> Tensor:
    """Compute `griffin.kernels.conv1d.ops.forward`."""
    window = None if window is None else dense_channels(window)
    tensors = {"x": dense_channels(x), "starts": starts, "window": window, "y": dense_like(x)}
    _launch(programs.conv_forward, tensors, {"weight": weight.contiguous(), "bias": bias.contiguous()})
    return tensors["y"]  # type: ignore[return-value]


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, starts: Tensor | None, window: Tensor | None, grad_x: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute `griffin.kernels.conv1d.ops.backward`."""
    window = None if window is None else dense_channels(window)
    grad_y, dense_grad_x = dense_channels(grad_y), dense_channels(grad_x)
    grad_window = None if window is None else window.new_empty(window.shape, dtype=torch.float32)
    sums = x.new_empty((math.ceil(len(x) / _chunk(x)), x.shape[1], programs.WIDTH + 1, x.shape[2]), dtype=torch.float32)
    tensors = {"x": dense_channels(x), "starts": starts, "window": window, "grad": grad_y, "grad_x": dense_grad_x}
    others = {"weight": weight.contiguous(), "grad_y": grad_y, "grad_window": grad_window, "grad_sums": sums}
    _launch(programs.conv_backward, tensors, others)
    total = sums.sum((0, 1))  # in a fixed order: deterministic
    if dense_grad_x is not grad_x:
        grad_x.copy_(dense_grad_x)
    return total[:-1], total[-1].clone(), grad_window

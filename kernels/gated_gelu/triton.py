"""The gated GeLU by Triton programs: one forward, and backward one and the sum of its partial sums."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from griffin.kernels.gated_gelu import programs
from griffin.kernels.triton_launch import launch_grid, multiprocessors

BLOCK, ROWS, WARPS = 256, 4, 4  # a tile: 16 bytes of each half for a lane
STAGES = 3  # tiles on the way
SPREAD = 8  # backward programs for each multiprocessor
SHORTEST_CHUNK = 32  # tokens of a backward program, which writes its sums for the bias


def chunk(tokens: int, width: int, device: torch.device) -> int:
    """Tokens of a backward program."""
    spread = SPREAD * multiprocessors(device) / math.ceil(width / BLOCK)
    return ROWS * math.ceil(max(tokens / spread, SHORTEST_CHUNK) / ROWS)


def _start(program: Any, rows: int, x: Tensor, **arguments: Any) -> None:
    tokens, width = x.shape[0], x.shape[1] // 2
    programs_ = math.ceil(width / BLOCK) * math.ceil(tokens / rows)
    sizes = {"N": tokens, "F": width, "L": rows, "x_n": x.stride(0), "BLOCK": BLOCK, "ROWS": ROWS, "STAGES": STAGES}
    if programs_:
        launch_grid(program, programs_, {"x": x, **arguments, **sizes}, x, warps=WARPS)


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """Compute `griffin.kernels.gated_gelu.ops.forward`."""
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    _start(programs.gated_gelu_forward, ROWS, x, bias=bias.contiguous(), y=y)
    return y


def backward(grad_y: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `griffin.kernels.gated_gelu.ops.backward`."""
    grad_y = grad_y if grad_y.stride(1) == 1 else grad_y.contiguous()
    grad_x = x.new_empty(x.shape)
    rows = chunk(x.shape[0], x.shape[1] // 2, x.device)
    sums = x.new_empty((math.ceil(x.shape[0] / rows), x.shape[1]), dtype=torch.float32)
    arguments = {"bias": bias.contiguous(), "grad_y": grad_y, "grad_n": grad_y.stride(0)}
    _start(programs.gated_gelu_backward, rows, x, grad_x=grad_x, grad_bias=sums, **arguments)
    return grad_x, sums.sum(0)  # in a fixed order: two runs give the same bits

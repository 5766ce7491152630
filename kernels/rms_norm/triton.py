"""RMSNorm by Triton programs: one forward, and backward one and the sum of its partial sums."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from griffin.kernels.rms_norm import programs
from griffin.kernels.triton_launch import launch_grid, multiprocessors

SPREAD = 16  # warps of backward programs for each multiprocessor; each program writes its sums for the weight
AHEAD, AHEAD_BYTES = 2, 100 * 1024  # rows on the way, where shared memory and registers have room for them


def _row_options(x: Tensor, sums: int = 0) -> tuple[int, int]:
    """Return BLOCK and warps for rows of x: 16 elements per lane, or 8 of float32 beside two sums."""
    block = max(16, 2 ** math.ceil(math.log2(x.shape[1])))
    per_lane = 8 if sums == 2 and x.element_size() == 4 else 16
    return block, min(max(block // (32 * per_lane), 1), 16)


def _start(
    program: Any, count: int, rows: dict[str, Tensor | None], like: Tensor, options: tuple[int, int], **others: Any
) -> None:
    """Start `count` instances of a program; `rows` are the tensors [N, D] that it reads, with their strides."""
    block, warps = options
    strides = {f"{name}_n": 0 if tensor is None else tensor.stride(0) for name, tensor in rows.items()}
    if count:
        launch_grid(
            program, count, {"D": like.shape[1], "BLOCK": block, **strides, **rows, **others}, like, warps=warps
        )


def forward(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute `griffin.kernels.rms_norm.ops.forward`."""
    y = x.new_empty(x.shape)
    total = None if branch is None else x.new_empty(x.shape)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    results = {"y": y, "total": total, "scale": scale}
    options = {
        "weight": weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "epsilon": epsilon,
        "HAS_BRANCH": branch is not None,
        "HAS_BIAS": bias is not None,
    }
    _start(programs.rms_norm_forward, x.shape[0], {"x": x, "branch": branch}, x, _row_options(x), **results, **options)
    return y, total, scale


def backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Compute `griffin.kernels.rms_norm.ops.backward`."""
    count = total.shape[0]
    block, warps = options = _row_options(total, 1 + has_bias)
    length = max(1, math.ceil(count * warps / (SPREAD * multiprocessors(total.device))))
    chunks = math.ceil(count / length)
    rows = {"grad_y": grad_y, "grad_total": grad_total, "total": total}
    row_bytes = block * total.element_size() * (2 if grad_total is None else 3)
    grad_x = total.new_empty(total.shape)
    sums = total.new_empty((1 + has_bias, chunks, total.shape[1]), dtype=torch.float32)
    _start(
        programs.rms_norm_backward,
        chunks,
        rows,
        total,
        options,
        weight=weight.contiguous(),
        scale=scale,
        grad_x=grad_x,
        sums=sums,
        N=count,
        L=length,
        HAS_GRAD_TOTAL=grad_total is not None,
        HAS_BIAS=has_bias,
        STAGES=1 + AHEAD if AHEAD * row_bytes <= AHEAD_BYTES else 1,
    )
    return grad_x, sums.sum(1)  # in a fixed order: two runs give the same bits

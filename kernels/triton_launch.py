"""Launch of Triton programs that iterate over time, with their shared block size and number of warps."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # channels per program: for 16-bit dtypes the smallest whose loads become asynchronous copies
WARPS = 1
MULTIPROCESSORS = 132  # of an H100, assumed where there is no GPU


def launch(
    program: Any, chunks: int, arguments: dict[str, Any], x: Tensor, *, block: int = BLOCK, warps: int = WARPS
) -> None:
    """Launch a program over all channel blocks and sequences of x [T, B, R] and over `chunks` chunks of time.

    `arguments` may hold more than the program takes. x stands in for arguments that are None. All launches of this
    package go through here.
    """
    _, batch, width = x.shape
    grid = math.ceil(width / block) * batch * chunks
    chosen = {name: arguments[name] for name in program.arg_names if name in arguments}
    chosen = {name: x if value is None else value for name, value in chosen.items()}
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        # Tests of rounding assume fused multiply-adds; Triton's default for them has changed between versions.
        program[(grid,)](**chosen, BLOCK=block, num_warps=warps, enable_fp_fusion=True)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, and that of an H100 for other devices."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count

"""Launch of Triton programs."""

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

    Arguments are those of `launch_grid`.
    """
    _, batch, width = x.shape
    launch_grid(program, math.ceil(width / block) * batch * chunks, arguments | {"BLOCK": block}, x, warps=warps)


def launch_grid(program: Any, programs: int, arguments: dict[str, Any], x: Tensor, *, warps: int) -> None:
    """Launch a program on a one-dimensional grid, on the device of x.

    `arguments` may hold more than the program takes. x stands in for arguments that are None. All launches of this
    package go through here.
    """
    chosen = {name: arguments[name] for name in program.arg_names if name in arguments}
    chosen = {name: x if value is None else value for name, value in chosen.items()}
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        # Tests of rounding assume fused multiply-adds; Triton's default for them has changed between versions.
        program[(programs,)](**chosen, num_warps=warps, enable_fp_fusion=True)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, and that of an H100 for other devices."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count

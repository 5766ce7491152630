"""Starting Triton programs that walk along time, and what all of them have in common."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # channels of a program of one warp: in 16 bits the least of which loads become asynchronous copies
WARPS = 1
MULTIPROCESSORS = 132  # an H100's, where there is no device to ask


def launch(
    program: Any, spans: int, arguments: dict[str, Any], like: Tensor, *, block: int = BLOCK, warps: int = WARPS
) -> None:
    """Start a program for so many spans of time, with those of the arguments that it has.

    `like` [T, B, R] tells device, sequences and channels, and is what the program gets for arguments that are None.
    Every launch passes here.
    """
    _, batch, width = like.shape
    grid = math.ceil(width / block) * batch * spans
    chosen = {name: arguments[name] for name in program.arg_names if name in arguments}
    chosen = {name: like if value is None else value for name, value in chosen.items()}
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        # Fused multiply-adds are what rounding is tested with; Triton's default for them changes.
        program[(grid,)](**chosen, BLOCK=block, num_warps=warps, enable_fp_fusion=True)


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count

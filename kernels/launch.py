"""Starting Triton programs: those that walk along time, and any."""

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
    """Start a program that walks along time, for so many spans of it, with those of the arguments that it has.

    `like` [T, B, R] tells device, sequences and channels, and is what the program gets for arguments that are None.
    """
    _, batch, width = like.shape
    start(program, math.ceil(width / block) * batch * spans, arguments | {"BLOCK": block}, like, warps=warps)


def start(program: Any, programs: int, arguments: dict[str, Any], like: Tensor, *, warps: int) -> None:
    """Start so many of a program, on the device of `like`, which takes the place of arguments that are None.

    Every launch passes here.
    """
    chosen = {name: arguments[name] for name in program.arg_names if name in arguments}
    chosen = {name: like if value is None else value for name, value in chosen.items()}
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        # Fused multiply-adds are what rounding is tested with; Triton's default for them changes.
        program[(programs,)](**chosen, num_warps=warps, enable_fp_fusion=True)


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count

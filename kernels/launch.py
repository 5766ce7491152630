"""Starting Triton programs that walk along time, and what all of them have in common."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # channels of a program of one warp: in 16 bits the least of which loads become asynchronous copies
WARPS = 1
MULTIPROCESSORS = 132  # an H100's, where there is no device to ask


def launch(program: Any, grid: int, arguments: dict[str, Any], stand_in: Tensor) -> None:
    """Start a program on the device of its tensors, with those of the arguments that it has.

    Of an argument that is None the program gets `stand_in`. Every launch passes here.
    """
    chosen = {name: arguments[name] for name in program.arg_names if name in arguments}
    chosen = {name: stand_in if value is None else value for name, value in chosen.items()}
    with torch.cuda.device(stand_in.device) if stand_in.is_cuda else nullcontext():
        # Fused multiply-adds are what rounding is tested with; Triton's default for them changes.
        program[(grid,)](**chosen, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True)


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count

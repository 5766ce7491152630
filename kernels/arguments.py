"""Validation of the arguments of operations on packed sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_sequences(name: str, x: Tensor) -> None:
    """Raise ValueError unless x has three axes, none of them empty, and a floating-point dtype."""
    if x.ndim != 3 or x.numel() == 0:
        raise ValueError(f"{name}: shape {list(x.shape)}; accepted: three axes, none empty")
    check_floating(name, x)


def check_floating(name: str, x: Tensor) -> None:
    """Raises ValueError unless x is floating point."""
    if x.dtype not in FLOATING:
        raise ValueError(f"{name}: {x.dtype}; accepted: {_names(FLOATING)}")


def check_argument(
    name: str, tensor: Tensor | None, shape: Sequence[int], dtypes: Sequence[torch.dtype], x_name: str, x: Tensor
) -> None:
    """Raise ValueError unless `tensor` is None, or has this shape, one of these dtypes and the device of x."""
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {list(tensor.shape)}; {x_name} of shape {list(x.shape)} needs {list(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype}; accepted: {_names(dtypes)} ({x_name} is {x.dtype})")
    if tensor.device != x.device:
        raise ValueError(f"{name}: on {tensor.device}; {x_name} is on {x.device}")


def check_chunk(chunk: int | None) -> None:
    """Raise ValueError for a negative chunk length."""
    if chunk is not None and chunk < 0:
        raise ValueError(f"chunk: {chunk}; accepted: None, 0 (sequential) or a number of steps")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(str, dtypes))

"""Layout and dtypes of the [T, B, R] tensors that kernels read and write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Of states and sums: float64 where x is, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def like(tensor: Tensor) -> Tensor:
    """An uninitialised dense tensor of the same shape, dtype and device, time-major or batch-major as this one."""
    steps, batch, width = tensor.shape
    if steps > 1 and batch > 1 and tensor.stride(0) < tensor.stride(1):
        return tensor.new_empty(batch, steps, width).transpose(0, 1)
    return tensor.new_empty(steps, batch, width)


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its channels adjoin, as programs read them, else a copy."""
    return tensor if tensor.stride(2) == 1 else like(tensor).copy_(tensor)


def strides(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """The arguments NAME_t and NAME_b of a program, for tensors [T, B, ...]; 0 for those that are None."""
    return {
        f"{name}_{axis}": 0 if tensor is None else tensor.stride(place)
        for name, tensor in tensors.items()
        for place, axis in enumerate("tb")
    }

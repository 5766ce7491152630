"""Memory layout and dtypes of the [T, B, R] tensors that kernels read and write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense_like(tensor: Tensor) -> Tensor:
    """Return an uninitialised dense tensor like this one: same shape, dtype, device, and time- or batch-major order."""
    steps, batch, width = tensor.shape
    if steps > 1 and batch > 1 and tensor.stride(0) < tensor.stride(1):
        return tensor.new_empty(batch, steps, width).transpose(0, 1)
    return tensor.new_empty(steps, batch, width)


def dense_channels(tensor: Tensor) -> Tensor:
    """Return the tensor itself if its channels are contiguous, as programs require, else a copy."""
    return tensor if tensor.stride(2) == 1 else dense_like(tensor).copy_(tensor)


def stride_arguments(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Return the program arguments NAME_t and NAME_b for tensors [T, B, ...]; 0 for tensors that are None."""
    return {
        f"{name}_{axis}": 0 if tensor is None else tensor.stride(place)
        for name, tensor in tensors.items()
        for place, axis in enumerate("tb")
    }

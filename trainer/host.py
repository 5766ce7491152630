"""Reading values of the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Copies of tensors of one device on the CPU, as float64. The host waits for the device once, not once a tensor.

    A training step reads the device through this function only. (On a CPU the result is a copy, too.)
    """
    values = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu()
    parts = values.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

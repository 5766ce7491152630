"""Reference causal depthwise convolution: a loop over tokens that the other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, window: Tensor | None
) -> Tensor:
    """Return the convolution of time-major x; arguments as of `griffin.kernels.conv1d.causal_conv1d`.

    Arithmetic is float32, or float64 if x is.
    """
    dtype = accumulation_dtype(x)
    steps, batch, width = x.shape
    before = len(weight) - 1
    window = x.new_zeros(before, batch, width, dtype=dtype) if window is None else window.to(dtype)
    inputs = torch.cat([window, x.to(dtype)])  # position t at before + t
    weight, bias = weight.to(dtype), bias.to(dtype)
    outputs = []
    for t in range(steps):
        y = bias.expand(batch, width)
        reached = torch.ones(batch, dtype=torch.bool, device=x.device)  # whether this tap is still in t's document
        for offset, tap in enumerate(weight.flip(0)):
            y = y + torch.where(reached[:, None], tap * inputs[before + t - offset], 0)
            if starts is not None and t >= offset:
                reached = reached & ~starts[t - offset]
        outputs.append(y)
    return torch.stack(outputs).to(x.dtype)

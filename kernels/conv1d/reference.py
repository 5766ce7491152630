"""The causal depthwise convolution as a loop over tokens: the definition that the fast path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> Tensor:
    """Convolution of time-major x; arguments as `griffin.kernels.conv1d.causal_conv1d`. Float64 where x is."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps, batch, _ = x.shape
    x_wide, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    outputs = []
    for t in range(steps):
        y = bias.expand_as(x_wide[t])
        reached = torch.ones(batch, dtype=torch.bool, device=x.device)  # taps that are still in t's document
        for offset, tap in enumerate(weight.flip(0)):
            if offset > t:
                break
            y = y + torch.where(reached[:, None], tap * x_wide[t - offset], 0)
            if starts is not None:
                reached = reached & ~starts[t - offset]
        outputs.append(y)
    return torch.stack(outputs).to(x.dtype)

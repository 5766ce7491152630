"""GeLU by tanh with its derivative, without new memory: on CPUs half the time of PyTorch's, whose tanh is slow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


def gelu_(z: Tensor, one: Tensor, two: Tensor, *, slope: bool = False) -> Tensor:
    """Make z gelu_tanh(z), float32 or float64; with `slope`, return its derivative, which is `two`.

    `one` and `two` are buffers like z that are overwritten.
    """
    # gelu(z) = z p with p = (1 + tanh(s / 2)) / 2 = sigmoid(s), s = LINEAR z (1 + CUBIC z^2)
    s = torch.mul(z, z, out=one).mul_(LINEAR * CUBIC).add_(LINEAR).mul_(z)
    p = torch.sigmoid(s, out=two)
    if slope:  # p + p (1 - p) z ds/dz, and z ds/dz = 3 s - 2 LINEAR z
        s.mul_(3).sub_(z, alpha=2 * LINEAR).mul_(p)
    z.mul_(p)
    return p.addcmul_(p, s, value=-1).add_(s) if slope else p

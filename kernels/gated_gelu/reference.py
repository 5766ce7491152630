"""Reference gated GeLU with bias, which the other backends are tested against."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from griffin.kernels.memory_layout import accumulation_dtype


def gated_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """Return y [N, F] of x [N, 2 F] and bias [2 F], differentiated by autograd, in float32, or float64 if x is."""
    dtype = accumulation_dtype(x)
    gate, up = (x.to(dtype) + bias.to(dtype)).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)

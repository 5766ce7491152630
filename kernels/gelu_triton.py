"""The logistic function and GeLU by tanh in Triton programs."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


# A warp has a quarter of its time for each element: exp2 and rsqrt are one instruction on a GPU, where exp and division
# are five to eight, to be right for denormal numbers.
@triton.jit
def sigmoid(z):
    root = tl.rsqrt(tl.exp2(z * -LOG2_E) + 1.0)
    return root * root


@triton.jit
def gelu(z):
    """gelu_tanh(z) and its derivative; (1 + tanh(s / 2)) / 2 is sigmoid(s)."""
    square = z * z
    gate = sigmoid(z * (square * CUBIC + 1.0) * LINEAR)
    slope = (square * CUBIC * 3.0 + 1.0) * LINEAR
    return z * gate, gate + z * gate * (1.0 - gate) * slope

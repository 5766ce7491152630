"""The temporal convolution of the recurrent block: causal, depthwise, blind beyond its document."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.conv1d.fast import causal_conv1d_fast

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, starts: Tensor | None = None, batch_first: bool = False
) -> Tensor:
    """Causal depthwise convolution of packed sequences (arXiv 2402.19427, section 2.4).

        y_t = bias + sum_j weight[K - 1 - j] x_{t-j}, over the j in 0 .. K - 1 for which t - j is in t's document

    Sums are float32, or float64 where x is. Gradients flow to x, weight and bias.

    Args:
        x: [T, B, R], floating point, of any strides.
        weight: [K, R], floating point; the last row multiplies the current token, the first the one K - 1 steps back.
        bias: [R], floating point.
        starts: [T, B] bool, True at each document's first token; None: each sequence is one document. A sequence whose
            position 0 is no start has nothing before it all the same.
        batch_first: x, `starts` and y have the batch axis before the time axis.

    Returns:
        y, with shape and dtype of x.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit x.
    """
    _check(x, weight, bias, starts)
    if not batch_first:
        return causal_conv1d_fast(x, weight, bias, starts)
    starts = None if starts is None else starts.transpose(0, 1)
    return causal_conv1d_fast(x.transpose(0, 1), weight, bias, starts).transpose(0, 1)


def _check(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> None:
    if x.ndim != 3 or x.numel() == 0:
        raise ValueError(f"x: shape {list(x.shape)}; accepted: three axes, none empty")
    width = x.shape[2]
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != width:
        raise ValueError(f"weight: shape {list(weight.shape)}; x of shape {list(x.shape)} needs [K, {width}], K >= 1")
    if bias.shape != (width,):
        raise ValueError(f"bias: shape {list(bias.shape)}; x of shape {list(x.shape)} needs [{width}]")
    if starts is not None and starts.shape != x.shape[:2]:
        raise ValueError(f"starts: shape {list(starts.shape)}; x of shape {list(x.shape)} needs {list(x.shape[:2])}")
    if starts is not None and starts.dtype != torch.bool:
        raise ValueError(f"starts: {starts.dtype}; accepted: torch.bool")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("starts", starts)):
        if tensor is None:
            continue
        if name != "starts" and not tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: {tensor.dtype}; accepted: a floating-point dtype")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}; x is on {x.device}")

"""The causal depthwise convolution as one multiply-add per tap over the whole sequence, with its own backward.

Autograd through the same operations would keep a masked copy of x per tap; this keeps x. On CPU, time is walked in
tiles that stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 2**17  # elements of a float32 buffer, of which up to three are live; 2 MB of L2 cache per core
DEVICE_TILE_ELEMENTS = 2**26  # no such cache elsewhere (CUDA): the tile only bounds memory


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spans(x: Tensor) -> Iterator[slice]:
    elements = TILE_ELEMENTS if x.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    tile = max(1, elements // (x.shape[1] * x.shape[2]))
    for first in range(0, x.shape[0], tile):
        yield slice(first, min(first + tile, x.shape[0]))


def _reach(starts: Tensor, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Per tap, the nearest first: 1 where the token that many steps back is in the same document, else 0; [T, B, 1]."""
    reached = torch.ones_like(starts)
    taps = [reached]
    for offset in range(1, width):
        reached = reached.clone()
        reached[offset - 1 :] &= ~starts[: max(0, len(starts) - offset + 1)]
        taps.append(reached)
    return [tap.to(dtype).unsqueeze(-1) for tap in taps]


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, starts):
        dtype = _accumulation_dtype(x)
        taps = weight.to(dtype).flip(0)  # taps[0] multiplies the current token
        reach = None if starts is None else _reach(starts, len(taps), dtype)
        y = torch.empty_like(x)
        for span in _spans(x):
            total = torch.addcmul(bias.to(dtype), x[span].to(dtype), taps[0])
            for offset in range(1, len(taps)):
                first = max(span.start, offset)
                if first >= span.stop:
                    break
                past = x[first - offset : span.stop - offset].to(dtype)
                if reach is not None:
                    past = past * reach[offset][first : span.stop]
                total[first - span.start :].addcmul_(past, taps[offset])
            y[span] = total
        ctx.save_for_backward(x, weight, bias, starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, starts = ctx.saved_tensors
        dtype = _accumulation_dtype(x)
        taps = weight.to(dtype).flip(0)
        reach = None if starts is None else _reach(starts, len(taps), dtype)
        grad_x = torch.empty_like(x)
        grad_taps = torch.zeros_like(taps)
        grad_bias = torch.zeros_like(taps[0])
        for span in _spans(x):
            past = x[span].to(dtype)
            grad = grad_y[span].to(dtype)
            grad_bias += grad.sum((0, 1))
            grad_taps[0] += (grad * past).sum((0, 1))
            total = grad * taps[0]
            for offset in range(1, len(taps)):
                # token t of this span is `offset` steps behind t + offset
                stop = min(span.stop + offset, len(x))
                if span.start + offset >= stop:
                    break
                grad = grad_y[span.start + offset : stop].to(dtype)
                if reach is not None:
                    grad = grad * reach[offset][span.start + offset : stop]
                steps = len(grad)
                total[:steps].addcmul_(grad, taps[offset])
                grad_taps[offset] += (grad * past[:steps]).sum((0, 1))
            grad_x[span] = total
        return grad_x, grad_taps.flip(0).to(weight.dtype), grad_bias.to(bias.dtype), None


def causal_conv1d_fast(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> Tensor:
    """Convolution of time-major x, any strides and device; arguments as `griffin.kernels.conv1d.causal_conv1d`.

    Accumulates in float32, or float64 where x is. Differentiable once.
    """
    return _CausalConv1d.apply(x, weight, bias, starts)

"""Causal depthwise convolution as one multiply-add per tap over the whole sequence.

Autograd through the same operations would save a masked copy of x per tap; the explicit backward saves only x. On CPUs,
time is processed in tiles that fit the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype, dense_like

TILE_ELEMENTS = 2**17  # elements of a float32 buffer; up to three are live, in 2 MB of L2 cache per core
DEVICE_TILE_ELEMENTS = 2**26  # on other devices (CUDA) the tile only bounds memory


def spans(x: Tensor) -> Iterator[slice]:
    elements = TILE_ELEMENTS if x.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    tile = max(1, elements // (x.shape[1] * x.shape[2]))
    for first in range(0, x.shape[0], tile):
        yield slice(first, min(first + tile, x.shape[0]))


def _other_document(starts: Tensor, width: int) -> list[Tensor]:
    """Return per tap, nearest first, whether the token that many steps back is in another document: [T, B, 1]."""
    cut = torch.zeros_like(starts)
    taps = [cut]
    for offset in range(1, width):
        cut = cut.clone()
        cut[offset - 1 :] |= starts[: max(0, len(starts) - offset + 1)]
        taps.append(cut)
    return [tap.unsqueeze(-1) for tap in taps]


def _prepend_window(x: Tensor, starts: Tensor | None, window: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return x and starts with the window prepended."""
    if starts is not None:
        starts = torch.cat([starts.new_zeros(len(window), starts.shape[1]), starts])
    return torch.cat([window.to(x.dtype), x]), starts


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor | None,
    window: Tensor | None,
    input_bias: Tensor | None = None,
) -> Tensor:
    """Compute `griffin.kernels.conv1d.ops.forward`, for any device and number of taps, optimised for CPUs."""
    if window is not None:
        y = dense_like(x)
        longer, starts = _prepend_window(x if input_bias is None else x + input_bias, starts, window)
        return y.copy_(forward(longer, weight, bias, starts, None)[len(window) :])
    dtype = accumulation_dtype(x)
    taps = weight.to(dtype).flip(0)  # taps[0] multiplies the current token
    masks = None if starts is None else _other_document(starts, len(taps))
    y = dense_like(x)
    for span in spans(x):
        reach = max(0, span.start - len(taps) + 1)
        inputs = _biased(x[reach : span.stop], input_bias, dtype)
        total = torch.addcmul(bias.to(dtype), inputs[span.start - reach :], taps[0])
        for offset in range(1, len(taps)):
            first = max(span.start, offset)
            if first >= span.stop:
                break
            past = inputs[first - offset - reach : span.stop - offset - reach]
            if masks is not None:
                past = past.masked_fill(masks[offset][first : span.stop], 0)
            total[first - span.start :].addcmul_(past, taps[offset])
        y[span] = total
    return y


def _biased(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    starts: Tensor | None,
    window: Tensor | None,
    input_bias: Tensor | None,
    grad_x: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute `griffin.kernels.conv1d.ops.backward`."""
    if window is not None:
        longer, starts = _prepend_window(x if input_bias is None else x + input_bias, starts, window)
        grad_y = torch.cat([grad_y.new_zeros(window.shape), grad_y])
        grad_longer = torch.empty_like(longer)
        grad_weight, grad_bias, *_ = backward(grad_y, longer, weight, starts, None, None, grad_longer)
        before, after = grad_longer.to(accumulation_dtype(x)).tensor_split([len(window)])
        grad_x.copy_(after)
        return grad_weight, grad_bias, None if input_bias is None else after.sum((0, 1)), before.clone()
    dtype = accumulation_dtype(x)
    taps = weight.to(dtype).flip(0)
    masks = None if starts is None else _other_document(starts, len(taps))
    grad_taps = torch.zeros_like(taps)
    grad_bias = torch.zeros_like(taps[0])
    grad_input_bias = None if input_bias is None else torch.zeros_like(taps[0])
    for span in spans(x):
        past = _biased(x[span], input_bias, dtype)
        grad = grad_y[span].to(dtype)
        grad_bias += grad.sum((0, 1))
        grad_taps[0] += (grad * past).sum((0, 1))
        total = grad * taps[0]
        for offset in range(1, len(taps)):
            # token t of this span is `offset` steps before t + offset
            stop = min(span.stop + offset, len(x))
            if span.start + offset >= stop:
                break
            grad = grad_y[span.start + offset : stop].to(dtype)
            if masks is not None:
                grad = grad.masked_fill(masks[offset][span.start + offset : stop], 0)
            steps = len(grad)
            total[:steps].addcmul_(grad, taps[offset])
            grad_taps[offset] += (grad * past[:steps]).sum((0, 1))
        grad_x[span] = total
        if grad_input_bias is not None:
            grad_input_bias += total.sum((0, 1))
    return grad_taps.flip(0), grad_bias, grad_input_bias, None

"""The gated GeLU in plain PyTorch operations, a tile of tokens at a time, so that buffers stay in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from griffin.kernels.gelu import gelu_
from griffin.kernels.memory_layout import accumulation_dtype

TILE_ELEMENTS = 2**17  # of each buffer, of which up to five are live
DEVICE_TILE_ELEMENTS = 2**26  # no such cache elsewhere (CUDA): the tile only bounds memory


def _tiles(x: Tensor) -> Iterator[slice]:
    elements = TILE_ELEMENTS if x.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    rows = max(1, 2 * elements // x.shape[1])
    for first in range(0, x.shape[0], rows):
        yield slice(first, min(first + rows, x.shape[0]))


def _buffers(x: Tensor, count: int) -> Tensor:
    """Return [count, rows, F] for all tiles: new memory for each tile costs more than what is computed in it."""
    rows = max((tile.stop - tile.start for tile in _tiles(x)), default=0)
    return x.new_empty((count, rows, x.shape[1] // 2), dtype=accumulation_dtype(x))


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """Compute `griffin.kernels.gated_gelu.ops.forward` on any device, optimised for CPUs."""
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    buffers = _buffers(x, 4)
    bias_gate, bias_up = bias.to(buffers.dtype).chunk(2)
    for tile in _tiles(x):
        gate, up, one, two = buffers[:, : tile.stop - tile.start]
        x_gate, x_up = x[tile].chunk(2, dim=1)
        gelu_(torch.add(x_gate, bias_gate, out=gate), one, two)
        torch.mul(gate, torch.add(x_up, bias_up, out=up), out=y[tile])
    return y


def backward(grad_y: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `griffin.kernels.gated_gelu.ops.backward`."""
    grad_x = x.new_empty(x.shape)
    buffers = _buffers(x, 5)
    bias_gate, bias_up = bias.to(buffers.dtype).chunk(2)
    grad_bias = buffers.new_zeros(x.shape[1])
    is_rounded = grad_x.dtype != buffers.dtype
    for tile in _tiles(x):
        gate, up, one, two, grad = buffers[:, : tile.stop - tile.start]
        x_gate, x_up = x[tile].chunk(2, dim=1)
        slope = gelu_(torch.add(x_gate, bias_gate, out=gate), one, two, slope=True)
        grad = grad.copy_(grad_y[tile]) if is_rounded else grad_y[tile]
        torch.add(x_up, bias_up, out=up).mul_(grad)
        # Rounded, gradients are summed before.
        grads = grad_x[tile].to(buffers.dtype) if is_rounded else grad_x[tile]
        grad_gate, grad_up = grads.chunk(2, dim=1)
        torch.mul(slope, up, out=grad_gate)
        torch.mul(gate, grad, out=grad_up)
        grad_bias += grads.sum(0)
        if is_rounded:
            grad_x[tile] = grads
    return grad_x, grad_bias

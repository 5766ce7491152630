"""RMSNorm of a sum in plain PyTorch operations, a tile of rows at a time, so that buffers stay in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype

TILE_ELEMENTS = 2**17  # of each buffer, of which up to three are live
DEVICE_TILE_ELEMENTS = 2**26  # no such cache elsewhere (CUDA): the tile only bounds memory


def _tiles(x: Tensor) -> Iterator[slice]:
    elements = TILE_ELEMENTS if x.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    rows = max(1, elements // x.shape[1])
    for first in range(0, x.shape[0], rows):
        yield slice(first, min(first + rows, x.shape[0]))


def _buffers(x: Tensor, count: int) -> Tensor:
    """Return [count, rows, D] for all tiles: new memory for each tile costs more than what is computed in it."""
    rows = max((tile.stop - tile.start for tile in _tiles(x)), default=0)
    return x.new_empty((count, rows, x.shape[1]), dtype=accumulation_dtype(x))


def forward(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute `griffin.kernels.rms_norm.ops.forward` on any device, optimised for CPUs."""
    y = x.new_empty(x.shape)
    total = None if branch is None else x.new_empty(x.shape)
    dtype = accumulation_dtype(x)
    scale = x.new_empty(x.shape[0], dtype=dtype)
    weights = 1 + weight.to(dtype)
    buffers = _buffers(x, 2)
    for tile in _tiles(x):
        rows, product = buffers[:, : tile.stop - tile.start]
        given = x[tile]
        if branch is not None and total is not None:
            if bias is None:
                given = torch.add(given, branch[tile], out=total[tile])
            else:
                added = torch.add(branch[tile], bias, out=total[tile] if total.dtype == dtype else rows)
                given = torch.add(added, given, out=added)
                if total.dtype != dtype:
                    given = total[tile].copy_(added)
        rows = given if given.dtype == dtype else rows.copy_(given)
        factor = torch.linalg.vector_norm(rows, dim=1, out=scale[tile])
        factor.square_().div_(x.shape[1]).add_(epsilon).rsqrt_()
        out = y[tile] if y.dtype == dtype else product
        torch.mul(rows, factor[:, None], out=out).mul_(weights)
        if out is product:
            y[tile] = product
    return y, total, scale


def backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Compute `griffin.kernels.rms_norm.ops.backward`."""
    width = total.shape[1]
    grad_x = total.new_empty(total.shape)
    weights = 1 + weight.to(scale.dtype)
    grads = weights.new_zeros(1 + has_bias, width)
    buffers = _buffers(total, 3)
    for tile in _tiles(total):
        rows, grad, product = buffers[:, : tile.stop - tile.start]
        is_rounded = total.dtype != scale.dtype
        rows = rows.copy_(total[tile]) if is_rounded else total[tile]
        given = grad.copy_(grad_y[tile]) if is_rounded else grad_y[tile]
        factor = scale[tile]
        torch.mul(given, rows, out=product)
        grads[0].addmv_(product.t(), factor)
        # dL/drow = factor (weights grad - row factor^2 mean(row weights grad))
        along = torch.mv(product, weights).mul_(factor.pow(3)).div_(width)
        out = grad if is_rounded else grad_x[tile]
        torch.mul(given, weights, out=out).mul_(factor[:, None]).addcmul_(rows, along[:, None], value=-1)
        if grad_total is not None:
            out += grad_total[tile]
        if has_bias:
            grads[1] += out.sum(0)
        if is_rounded:
            grad_x[tile] = out
    return grad_x, grads

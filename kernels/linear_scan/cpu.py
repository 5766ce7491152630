"""Diagonal linear recurrence in plain PyTorch operations, with an explicit backward.

Time is processed in tiles that fit the cache. Within a tile the recurrence is a two-level scan: all chunks of the tile
advance in parallel from a zero state, the states at chunk ends are chained, and all chunks advance in parallel again,
from their true initial states. Chunks that cannot be chained, or are not finite, are computed step by step.

Axes: S steps of a tile (= N chunks of L steps), B sequences, R channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype, dense_like

# Measured on a CPU with 2 MB of L2 cache per core. Gates and scan of a tile use six to nine float32 buffers of this
# many elements.
TILE_ELEMENTS = 2**17
STEP_ELEMENTS = 2**13  # elements of one step of all chunks: amortises the cost of calling an operation
# On other devices (CUDA) calls are expensive and the tile only bounds memory.
DEVICE_TILE_ELEMENTS = 2**26
DEVICE_STEP_ELEMENTS = 2**20

# The largest product p of a over a chunk for which the chunk is chained. The state after a chunk, p h + end, is only as
# exact as its largest term: if p h is large and the sum is small, it has fewer digits than the loop's.
MAX_CHAINED_PRODUCT = 4.0


@dataclass(frozen=True)
class Tiling:
    """Split of T steps into tiles of N * L steps, of which the last may be partly empty."""

    steps: int  # T
    chunks: int  # N
    chunk: int  # L

    @classmethod
    def of(cls, x: Tensor) -> Tiling:
        steps, row = x.shape[0], x.shape[1] * x.shape[2]
        on_cpu = x.device.type == "cpu"
        tile = min(steps, max(1, (TILE_ELEMENTS if on_cpu else DEVICE_TILE_ELEMENTS) // row))
        tile = math.ceil(steps / math.ceil(steps / tile))  # even tiles
        chunks = max(1, min((STEP_ELEMENTS if on_cpu else DEVICE_STEP_ELEMENTS) // row, math.isqrt(2 * tile)))
        return cls(steps, chunks, math.ceil(tile / chunks))

    @property
    def tile(self) -> int:
        return self.chunks * self.chunk

    def spans(self) -> Iterator[slice]:
        for first in range(0, self.steps, self.tile):
            yield slice(first, min(first + self.tile, self.steps))


def scan_(
    a: Tensor, b: Tensor, state: Tensor, tiling: Tiling, *, reverse: bool = False, products: Tensor | None = None
) -> Tensor:
    """Overwrite b with h of h_t = a_t h_{t-1} + b_t, starting from `state` [B, R]; return the last state.

    a, b [S, B, R] are contiguous. `reverse` runs from the last step to the first. `products` [N, B, R], float64, are
    the products of a over each chunk, for callers who know them more exactly than from rounded factors.
    """
    order = slice(None, None, -1 if reverse else 1)
    if tiling.chunks > 1:
        chunked = (tiling.chunks, tiling.chunk, *a.shape[1:])
        a_steps, b_steps = (tensor.view(chunked).unbind(1)[order] for tensor in (a, b))  # L of [N, B, R]
        states = torch.stack(_chain(a_steps, b_steps, state, products, order)[order]).to(b.dtype)
        if states.isfinite().all():
            firsts, last = (states[1:], states[0]) if reverse else (states[:-1], states[-1])
            _scan_steps_(a_steps, b_steps, firsts)
            return last.clone()
    return _scan_steps_(a.unbind(0)[order], b.unbind(0)[order], state).clone()


def _scan_steps_(a_steps: Sequence[Tensor], b_steps: Sequence[Tensor], state: Tensor) -> Tensor:
    for a_l, b_l in zip(a_steps, b_steps, strict=True):
        state = b_l.addcmul_(a_l, state)
    return state


def _chain(
    a_steps: Sequence[Tensor], b_steps: Sequence[Tensor], state: Tensor, products: Tensor | None, order: slice
) -> list[Tensor]:
    """Return N + 1 states [B, R], float64, in scan order: the state before each chunk, and the last one.

    Products are float64 as well: for factors near 1, float32 would be rounded in the same direction at every step. A
    chunk is computed step by step if it cannot be chained: see MAX_CHAINED_PRODUCT.
    """
    float64 = torch.float64
    ends = b_steps[0].clone()
    for a_l, b_l in zip(a_steps[1:], b_steps[1:], strict=True):
        torch.addcmul(b_l, a_l, ends, out=ends)
    if products is None:
        products = a_steps[0].to(float64, copy=True)
        for a_l in a_steps[1:]:
            products.mul_(a_l)
    chains = ((products.abs() <= MAX_CHAINED_PRODUCT) & ends.isfinite()).flatten(1).all(1).tolist()
    ends_64 = ends.to(float64)
    states = [state.to(float64)]
    for n in range(len(chains))[order]:
        if chains[n]:
            states.append(torch.addcmul(ends_64[n], products[n], states[-1]))
        else:
            last = states[-1].to(ends.dtype)
            for a_l, b_l in zip(a_steps, b_steps, strict=True):
                last = torch.addcmul(b_l[n], a_l[n], last)
            states.append(last.to(float64))
    return states


def default_starts(starts: Tensor | None, initial_state: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the document starts; without starts and initial state, each sequence starts at position 0."""
    if starts is None and initial_state is None:
        starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        starts[0] = True
    return starts


def slice_steps(tensor: Tensor | None, span: slice) -> Tensor | None:
    """Return the steps of a span, or None for no tensor."""
    return None if tensor is None else tensor[span]


class _Tile:
    """Buffers for a and b of one tile, [S, B, R] in the accumulation dtype."""

    def __init__(self, x: Tensor, tiling: Tiling) -> None:
        dtype = accumulation_dtype(x)
        self.a, self.b = (x.new_empty((tiling.tile, *x.shape[1:]), dtype=dtype) for _ in range(2))

    def fill(self, a: Tensor, starts: Tensor | None) -> None:
        """Copy a into the tile. Steps past the end of a partial tile keep the state: a = 1, b = 0."""
        steps = len(a)
        self.a[:steps] = a
        self.a[steps:] = 1
        self.b[steps:] = 0
        if starts is not None:
            self.a[:steps].masked_fill_(starts[..., None], 0)


def forward(
    a: Tensor, b: Tensor, starts: Tensor | None, initial_state: Tensor | None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `griffin.kernels.linear_scan.ops.forward` on any device, optimised for CPUs. `chunk` is ignored."""
    starts = default_starts(starts, initial_state, b)
    tiling = Tiling.of(b)
    tile = _Tile(b, tiling)
    state = tile.a.new_zeros(b.shape[1:]) if initial_state is None else initial_state.to(tile.a.dtype)
    h = dense_like(b)
    for span in tiling.spans():
        tile.fill(a[span], slice_steps(starts, span))
        steps = span.stop - span.start
        tile.b[:steps] = b[span]
        state = scan_(tile.a, tile.b, state, tiling)
        h[span] = tile.b[:steps]
    return h, state.clone()


def backward(
    grad_h: Tensor,
    grad_last: Tensor,
    a: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    h: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `griffin.kernels.linear_scan.ops.backward`."""
    starts = default_starts(starts, initial_state, h)
    tiling = Tiling.of(h)
    tile = _Tile(h, tiling)
    grad_a, grad_b = dense_like(a), dense_like(h)
    first_state = tile.a.new_zeros(h.shape[1:]) if initial_state is None else initial_state.to(tile.a.dtype)
    # carry_t = a_t dL/dh_t flows into h_{t-1}: dL/dh_t = dL/dy_t + carry_{t+1}.
    carry = grad_last
    for span in reversed(list(tiling.spans())):
        starting = slice_steps(starts, span)
        tile.fill(a[span], starting)
        steps = span.stop - span.start
        torch.mul(tile.a[:steps], grad_h[span], out=tile.b[:steps])
        carry_after, carry = carry, scan_(tile.a, tile.b, carry, tiling, reverse=True)
        total = tile.a[:steps]  # no longer needed by the scan
        total[:-1] = tile.b[1:steps]
        total[-1] = carry_after
        total += grad_h[span]
        grad_b[span] = total
        total[0] *= h[span.start - 1] if span.start else first_state
        total[1:] *= h[span.start : span.stop - 1]
        if starting is not None:
            total.masked_fill_(starting[..., None], 0)
        grad_a[span] = total
    return grad_a, grad_b, carry.clone()

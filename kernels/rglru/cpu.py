"""The RG-LRU in plain PyTorch operations, gates and scan together, with its own backward.

Time is walked in tiles small enough that the chain of elementwise operations stays in cache. Within a tile the
recurrence is a two-level scan: all chunks of the tile advance side by side from a zero state, the states at the chunk
ends are chained, and each chunk then adds the decayed state it should have begun with.

Axes: S steps of a tile (= N chunks of L steps), B sequences, R channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from griffin.kernels.rglru.reference import GATE_SCALE, MIN_SQRT_ARGUMENT

# Measured on a CPU with 2 MB of L2 cache per core. A tile works on six to eight float32 buffers of this many elements.
TILE_ELEMENTS = 2**17
STEP_ELEMENTS = 2**13  # elements that one step of all chunks covers: amortises the cost of calling an operation
# Elsewhere (CUDA) there is no such cache to stay in and calls are dear: the tile only bounds memory.
DEVICE_TILE_ELEMENTS = 2**26
DEVICE_STEP_ELEMENTS = 2**20

MIN_MULTIPLIER = math.sqrt(MIN_SQRT_ARGUMENT)


@dataclass(frozen=True)
class _Tiling:
    """How T steps are cut: tiles of N * L steps, the last one possibly partly empty."""

    steps: int  # T
    chunks: int  # N
    chunk: int  # L

    @classmethod
    def of(cls, x: Tensor) -> _Tiling:
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


def _scan_(a: Tensor, b: Tensor, state: Tensor, tiling: _Tiling, *, reverse: bool = False) -> Tensor:
    """Turn b into h of h_t = a_t h_{t-1} + b_t in place, from `state` [B, R]; returns the last state, spoils a.

    `reverse` runs from the last step to the first. a, b [S, B, R], contiguous.
    """
    chunked = (tiling.chunks, tiling.chunk, *a.shape[1:])
    a, b = a.view(chunked), b.view(chunked)
    order = slice(None, None, -1 if reverse else 1)
    a_steps, b_steps = a.unbind(1)[order], b.unbind(1)[order]  # L of [N, B, R]
    if tiling.chunks == 1:
        previous = state[None]
        for a_l, b_l in zip(a_steps, b_steps, strict=True):
            previous = b_l.addcmul_(a_l, previous)
        return previous[0].clone()

    for step in range(1, tiling.chunk):
        b_steps[step].addcmul_(a_steps[step], b_steps[step - 1])
        a_steps[step].mul_(a_steps[step - 1])
    states = [state]
    for a_n, b_n in zip(a_steps[-1].unbind(0)[order], b_steps[-1].unbind(0)[order], strict=True):
        states.append(torch.addcmul(b_n, a_n, states[-1]))
    b.addcmul_(a, torch.stack(states[:-1][order])[:, None])
    return states[-1]


class _Workspace:
    """Buffers [S, B, R] in the dtype of the arithmetic, reused by every tile, and the gates computed in them."""

    def __init__(self, x: Tensor, decay: Tensor, tiling: _Tiling, extra: int) -> None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        shape = (tiling.tile, *x.shape[1:])
        self.i, self.r, self.a, self.m, *self.extra = (x.new_empty(shape, dtype=dtype) for _ in range(4 + extra))
        self.rate = -GATE_SCALE * F.softplus(decay.to(dtype))  # [R]: log a = rate * r

    def gates(self, input_gate: Tensor, recurrence_gate: Tensor, starts: Tensor | None) -> None:
        """Fill i = sigmoid(input_gate), r = sigmoid(recurrence_gate), a and the multiplier m for one tile's steps.

        Steps past a partial tile's end hold the state: a = 1.
        """
        steps = input_gate.shape[0]
        i, r, a, m = self.i[:steps], self.r[:steps], self.a[:steps], self.m[:steps]
        i.copy_(input_gate).sigmoid_()
        r.copy_(recurrence_gate).sigmoid_()
        torch.mul(r, self.rate, out=m)
        torch.exp(m, out=a)
        # sqrt(1 - a^2) = (1 + a) sqrt(tanh(-log a / 2)): as exact near a = 1 as expm1, at a quarter of its cost.
        m.mul_(-0.5).tanh_().sqrt_()
        m.addcmul_(m, a)
        if starts is not None:
            rows = starts.flatten().nonzero().squeeze(1)
            a.view(-1, a.shape[-1]).index_fill_(0, rows, 0)
            m.view(-1, m.shape[-1]).index_fill_(0, rows, 1)
        self.a[steps:] = 1


class _RGLRU(torch.autograd.Function):
    """Saves its inputs and y; gates, decays and multipliers are computed again in the backward."""

    @staticmethod
    def forward(ctx, x, input_gate, recurrence_gate, decay, starts, initial_state):
        tiling = _Tiling.of(x)
        work = _Workspace(x, decay, tiling, extra=0)
        state = work.a.new_zeros(x.shape[1:]) if initial_state is None else initial_state.to(work.a.dtype)
        y = torch.empty_like(x)
        for span in tiling.spans():
            work.gates(input_gate[span], recurrence_gate[span], None if starts is None else starts[span])
            steps = span.stop - span.start
            b = work.i  # b = m i x
            b[:steps].mul_(x[span]).mul_(work.m[:steps])
            b[steps:] = 0
            state = _scan_(work.a, b, state, tiling)
            y[span] = b[:steps]
        ctx.save_for_backward(x, input_gate, recurrence_gate, decay, starts, initial_state, y)
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        x, input_gate, recurrence_gate, decay, starts, initial_state, y = ctx.saved_tensors
        tiling = _Tiling.of(x)
        work = _Workspace(x, decay, tiling, extra=2)
        carries, slope = work.extra
        grad_x, grad_i, grad_r = (torch.empty_like(t) for t in (x, input_gate, recurrence_gate))
        grad_rate = torch.zeros_like(work.rate)
        zero_state = work.a.new_zeros(x.shape[1:])
        first_state = zero_state if initial_state is None else initial_state.to(zero_state.dtype)
        # carry_t = a_t dL/dh_t is what reaches h_{t-1}: dL/dh_t = dL/dy_t + carry_{t+1}.
        carry = zero_state if grad_final is None else grad_final
        for span in reversed(list(tiling.spans())):
            work.gates(input_gate[span], recurrence_gate[span], None if starts is None else starts[span])
            steps = span.stop - span.start
            i, r, a, m, c, q = (t[:steps] for t in (work.i, work.r, work.a, work.m, carries, slope))

            torch.clamp(m, min=MIN_MULTIPLIER, out=q)
            torch.div(a, q, out=q).mul_(a)  # -dm/dlog a = a^2 / m, bounded
            if grad_y is None:
                carries.zero_()
            else:
                torch.mul(a, grad_y[span], out=c)
                carries[steps:] = 0
            carry_after, carry = carry, _scan_(work.a, carries, carry, tiling, reverse=True)
            grad_h = a  # the scan has spent a
            grad_h[:-1] = c[1:]
            grad_h[-1] = carry_after
            if grad_y is not None:
                grad_h += grad_y[span]

            # log a = rate r, through a_t h_{t-1} and through m
            c[0] *= y[span.start - 1] if span.start else first_state
            c[1:] *= y[span.start : span.stop - 1]
            grad_b = m.mul_(grad_h)  # dL/d(i x)
            c.addcmul_(grad_h.mul_(q), torch.mul(i, x[span], out=q), value=-1)
            c.mul_(r)
            grad_rate += c.sum((0, 1))
            grad_r[span] = c.addcmul_(c, r, value=-1).mul_(work.rate)

            grad_x[span] = grad_b.mul_(i)
            grad_b.mul_(x[span])
            grad_i[span] = grad_b.addcmul_(grad_b, i, value=-1)

        grad_decay = grad_rate.mul_(-GATE_SCALE * decay.to(grad_rate.dtype).sigmoid()).to(decay.dtype)
        grad_initial = None if initial_state is None else carry.to(initial_state.dtype)
        return grad_x, grad_i, grad_r, grad_decay, None, grad_initial


def rglru_cpu(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """RG-LRU of time-major tensors, any strides; arguments as `griffin.kernels.rglru.rglru`.

    Works on any device; made for CPUs. Arithmetic is float32, or float64 where x is. Differentiable once.
    """
    if starts is None and initial_state is None:
        starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        starts[0] = True
    return _RGLRU.apply(x, input_gate, recurrence_gate, decay, starts, initial_state)

"""RG-LRU in plain PyTorch operations, gates and scan together, with an explicit backward.

Time is processed in the tiles of `griffin.kernels.linear_scan.cpu`. Axes: S steps of a tile, B sequences, R channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.kernels.gelu import gelu_
from griffin.kernels.linear_scan.cpu import Tiling, default_starts, scan_, slice_steps
from griffin.kernels.memory_layout import accumulation_dtype, dense_like
from griffin.kernels.recurrence import MIN_SQRT_ARGUMENT
from griffin.kernels.rglru.reference import GATE_SCALE, RGLRUInputs

MIN_MULTIPLIER = math.sqrt(MIN_SQRT_ARGUMENT)
LOG2_E = math.log2(math.e)


class _Workspace:
    """Buffers [S, B, R] in the accumulation dtype, reused by every tile, and the computation of gates in them."""

    def __init__(self, x: Tensor, decay: Tensor, gate_bias: Tensor | None, tiling: Tiling, extra: int) -> None:
        dtype = accumulation_dtype(x)
        shape = (tiling.tile, *x.shape[1:])
        self.i, self.r, self.a, self.m, *self.extra = (x.new_empty(shape, dtype=dtype) for _ in range(4 + extra))
        self.rate = -GATE_SCALE * F.softplus(decay.to(dtype))  # [R]: log a = rate * r
        self._rate_2 = self.rate * LOG2_E  # exp2 takes a quarter of exp's time
        self._bias = None if gate_bias is None else gate_bias.to(dtype)

    def gates(self, input_gate: Tensor, recurrence_gate: Tensor, starts: Tensor | None) -> None:
        """Compute i = sigmoid(input_gate), r = sigmoid(recurrence_gate), a and the multiplier m of one tile.

        Steps past the end of a partial tile keep the state: a = 1.
        """
        steps = input_gate.shape[0]
        i, r, a, m = self.i[:steps], self.r[:steps], self.a[:steps], self.m[:steps]
        if self._bias is None:
            i.copy_(input_gate)
            r.copy_(recurrence_gate)
        else:
            torch.add(input_gate, self._bias[0], out=i)
            torch.add(recurrence_gate, self._bias[1], out=r)
        i.sigmoid_()
        r.sigmoid_()
        torch.mul(r, self._rate_2, out=m)
        torch.exp2(m, out=a)
        # sqrt(1 - a^2) = (1 + a) sqrt(tanh(-log a / 2)): as accurate near a = 1 as expm1, at a quarter of its cost.
        m.mul_(-0.5 / LOG2_E).tanh_().sqrt_()
        m.addcmul_(m, a)
        if starts is not None:
            rows = starts.flatten().nonzero().squeeze(1)
            a.view(-1, a.shape[-1]).index_fill_(0, rows, 0)
            m.view(-1, m.shape[-1]).index_fill_(0, rows, 1)
        self.a[steps:] = 1
        self.r[steps:] = 0

    def products(self, starts: Tensor | None, tiling: Tiling) -> Tensor | None:
        """Return the product of a over each chunk, [N, B, R] in float64.

        It is computed from sums of log a, so the rounding errors of a do not accumulate. None for a single chunk.
        """
        if tiling.chunks == 1:
            return None
        sums = self.r.view(tiling.chunks, tiling.chunk, *self.r.shape[1:]).sum(1)
        products = sums.double().mul_(self.rate).exp_()
        if starts is not None:
            padded = F.pad(starts, (0, 0, 0, tiling.tile - len(starts)))
            products.masked_fill_(padded.view(tiling.chunks, tiling.chunk, -1).any(1)[..., None], 0)
        return products


def forward(
    inputs: RGLRUInputs, save_states: bool, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Compute `griffin.kernels.rglru.ops.forward` on any device, optimised for CPUs. `chunk` is ignored."""
    x, input_gate, recurrence_gate, decay, branch, starts, initial_state, gate_bias = inputs
    starts = default_starts(starts, initial_state, x)
    tiling = Tiling.of(x)
    work = _Workspace(x, decay, gate_bias, tiling, extra=0)
    state = work.a.new_zeros(x.shape[1:]) if initial_state is None else initial_state.to(work.a.dtype)
    y = dense_like(x)
    states = dense_like(x) if save_states and branch is not None else None
    for span in tiling.spans():
        starting = slice_steps(starts, span)
        work.gates(input_gate[span], recurrence_gate[span], starting)
        steps = span.stop - span.start
        b = work.i  # b = m i x
        b[:steps].mul_(x[span]).mul_(work.m[:steps])
        b[steps:] = 0
        state = scan_(work.a, b, state, tiling, products=work.products(starting, tiling))
        if states is not None:
            states[span] = b[:steps]
        if branch is not None:
            z = work.m[:steps].copy_(branch[span])
            gelu_(z, work.a[:steps], work.r[:steps])
            b[:steps].mul_(z)
        y[span] = b[:steps]
    return y, state.clone(), states, None


def backward(
    inputs: RGLRUInputs,
    states: Tensor | None,
    first_states: Tensor | None,
    grad_y: Tensor,
    grad_last: Tensor,
    grad_branch: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute `griffin.kernels.rglru.ops.backward`. Gates, decays and multipliers are recomputed."""
    if states is None:
        states = forward(inputs._replace(branch=None), save_states=False)[0]
    x, input_gate, recurrence_gate, decay, branch, starts, initial_state, gate_bias = inputs
    starts = default_starts(starts, initial_state, x)
    tiling = Tiling.of(x)
    work = _Workspace(x, decay, gate_bias, tiling, extra=4)
    carries, slope, grads, buffer = work.extra
    grad_x, grad_i, grad_r = dense_like(x), dense_like(input_gate), dense_like(recurrence_gate)
    grad_rate = torch.zeros_like(work.rate)
    grad_bias = None if gate_bias is None else work.rate.new_zeros(gate_bias.shape)
    first_state = work.a.new_zeros(x.shape[1:]) if initial_state is None else initial_state.to(work.a.dtype)
    # carry_t = a_t dL/dh_t flows into h_{t-1}: dL/dh_t = dL/dy_t + carry_{t+1}.
    carry = grad_last
    for span in reversed(list(tiling.spans())):
        starting = slice_steps(starts, span)
        work.gates(input_gate[span], recurrence_gate[span], starting)
        steps = span.stop - span.start
        i, r, a, m, c, q, g = (t[:steps] for t in (work.i, work.r, work.a, work.m, carries, slope, grads))
        g.copy_(grad_y[span])
        if branch is not None:
            assert grad_branch is not None
            z = q.copy_(branch[span])
            grad_branch[span] = gelu_(z, c, buffer[:steps], slope=True).mul_(torch.mul(g, states[span], out=c))
            g.mul_(z)

        torch.clamp(m, min=MIN_MULTIPLIER, out=q)
        torch.div(a, q, out=q).mul_(a)  # -dm/dlog a = a^2 / m, bounded
        torch.mul(a, g, out=c)
        carries[steps:] = 0
        products = work.products(starting, tiling)
        carry_after, carry = carry, scan_(work.a, carries, carry, tiling, reverse=True, products=products)
        grad_h = a  # no longer needed by the scan
        grad_h[:-1] = c[1:]
        grad_h[-1] = carry_after
        grad_h += g

        # log a = rate r, through a_t h_{t-1} and through m
        c[0] *= states[span.start - 1] if span.start else first_state
        c[1:] *= states[span.start : span.stop - 1]
        grad_b = m.mul_(grad_h)  # dL/d(i x)
        c.addcmul_(grad_h.mul_(q), torch.mul(i, x[span], out=q), value=-1)
        c.mul_(r)
        grad_rate += c.sum((0, 1))
        grad_r[span] = c.addcmul_(c, r, value=-1).mul_(work.rate)
        if grad_bias is not None:
            grad_bias[1] += c.sum((0, 1))

        grad_x[span] = grad_b.mul_(i)
        grad_b.mul_(x[span])
        grad_i[span] = grad_b.addcmul_(grad_b, i, value=-1)
        if grad_bias is not None:
            grad_bias[0] += grad_b.sum((0, 1))

    grad_decay = grad_rate.mul_(-GATE_SCALE * decay.to(grad_rate.dtype).sigmoid())
    return grad_x, grad_i, grad_r, grad_decay, carry.clone(), grad_bias

"""Triton programs of the gated GeLU: tiles of ROWS tokens by BLOCK channels of x [N, 2 F], whose halves they read.

Rows of x and of the gradient of y are x_n and grad_n elements apart, their channels adjoin. Arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from griffin.kernels.gelu_triton import gelu

DO_NOT_SPECIALIZE = ["N", "L"]  # must not compile anew


@triton.jit
def _tile(p, stride, o_n, o_f, mask):
    return tl.load(p + o_n.to(tl.int64)[:, None] * stride + o_f[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def gated_gelu_forward(x, bias, y, N, F, x_n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y [N, F] of x [N, 2 F] and bias [2 F]; one tile."""
    blocks = tl.cdiv(F, BLOCK)
    o_f = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    o_n = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    there = o_f < F
    mask = (o_n < N)[:, None] & there[None, :]
    gate = _tile(x, x_n, o_n, o_f, mask) + tl.load(bias + o_f, mask=there, other=0.0).to(tl.float32)[None, :]
    up = _tile(x + F, x_n, o_n, o_f, mask) + tl.load(bias + F + o_f, mask=there, other=0.0).to(tl.float32)[None, :]
    factor, _ = gelu(gate)
    tl.store(y + o_n.to(tl.int64)[:, None] * F + o_f[None, :], factor * up, mask=mask)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def gated_gelu_backward(
    x, bias, grad_y, grad_x, grad_bias, N, L, F, x_n, grad_n,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grad_x [N, 2 F], and of the bias the sums over each L tokens, grad_bias [N / L, 2 F] in float32."""
    blocks = tl.cdiv(F, BLOCK)
    o_f = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(0) // blocks
    there = o_f < F
    bias_gate = tl.load(bias + o_f, mask=there, other=0.0).to(tl.float32)[None, :]
    bias_up = tl.load(bias + F + o_f, mask=there, other=0.0).to(tl.float32)[None, :]
    hi = tl.minimum(chunk * L + L, N)
    sum_gate = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_up = tl.zeros([ROWS, BLOCK], tl.float32)
    for n in tl.range(chunk * L, hi, ROWS, num_stages=STAGES):
        o_n = n + tl.arange(0, ROWS)
        mask = (o_n < hi)[:, None] & there[None, :]
        gate, up = _tile(x, x_n, o_n, o_f, mask) + bias_gate, _tile(x + F, x_n, o_n, o_f, mask) + bias_up
        grad = _tile(grad_y, grad_n, o_n, o_f, mask)
        factor, slope = gelu(gate)
        grad_gate, grad_up = grad * up * slope, grad * factor
        p_grad = grad_x + o_n.to(tl.int64)[:, None] * 2 * F + o_f[None, :]
        tl.store(p_grad, grad_gate, mask=mask)
        tl.store(p_grad + F, grad_up, mask=mask)
        sum_gate += grad_gate
        sum_up += grad_up
    p_sum = grad_bias + chunk.to(tl.int64) * 2 * F + o_f
    tl.store(p_sum, tl.sum(sum_gate, axis=0), mask=there)
    tl.store(p_sum + F, tl.sum(sum_up, axis=0), mask=there)

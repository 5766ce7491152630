"""Triton programs of RMSNorm: rows [D] in one piece of BLOCK, a power of 2. Arithmetic is float32.

Rows of NAME are NAME_n elements apart, their channels adjoin; results are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

DO_NOT_SPECIALIZE = ["N", "L"]  # must not compile anew


@triton.jit
def _row(p, stride, n, o_d, mask):
    return tl.load(p + tl.cast(n, tl.int64) * stride + o_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rms_norm_forward(
    x, branch, bias, weight, y, total, scale, epsilon, D, x_n, branch_n,
    HAS_BRANCH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a row of total = x + (branch + bias), rounded, of y, and of scale [N], which multiplies the row."""
    n = tl.program_id(0)
    o_d = tl.arange(0, BLOCK)
    mask = o_d < D
    if HAS_BRANCH:
        added = _row(branch, branch_n, n, o_d, mask)
        if HAS_BIAS:
            added += tl.load(bias + o_d, mask=mask, other=0.0).to(tl.float32)
        rounded = (_row(x, x_n, n, o_d, mask) + added).to(total.dtype.element_ty)
        tl.store(total + tl.cast(n, tl.int64) * D + o_d, rounded, mask=mask)
        row = rounded.to(tl.float32)
    else:
        row = _row(x, x_n, n, o_d, mask)
    factor = tl.rsqrt(tl.sum(row * row, axis=0) / D + epsilon)
    tl.store(scale + n, factor)
    weights = tl.load(weight + o_d, mask=mask, other=0.0).to(tl.float32) + 1.0
    tl.store(y + tl.cast(n, tl.int64) * D + o_d, row * factor * weights, mask=mask)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def rms_norm_backward(
    grad_y, grad_total, total, weight, scale, grad_x, sums, N, L, D, grad_y_n, grad_total_n, total_n,
    HAS_GRAD_TOTAL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store grad_x [N, D], and in sums [1 or 2, N / L, D], float32, those of weight and bias over each L rows."""
    chunk = tl.program_id(0)
    o_d = tl.arange(0, BLOCK)
    mask = o_d < D
    weights = tl.load(weight + o_d, mask=mask, other=0.0).to(tl.float32) + 1.0
    sum_weight, sum_bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for n in tl.range(chunk * L, tl.minimum(chunk * L + L, N), num_stages=STAGES):
        factor = tl.load(scale + n)
        grad, normed = _row(grad_y, grad_y_n, n, o_d, mask), _row(total, total_n, n, o_d, mask) * factor
        sum_weight += grad * normed
        grad *= weights
        grad = (grad - normed * (tl.sum(grad * normed, axis=0) / D)) * factor
        if HAS_GRAD_TOTAL:
            grad += _row(grad_total, grad_total_n, n, o_d, mask)
        tl.store(grad_x + tl.cast(n, tl.int64) * D + o_d, grad, mask=mask)
        if HAS_BIAS:
            sum_bias += grad
    p_sums = sums + tl.cast(chunk, tl.int64) * D + o_d
    tl.store(p_sums, sum_weight, mask=mask)
    if HAS_BIAS:
        tl.store(p_sums + tl.cast(tl.num_programs(0), tl.int64) * D, sum_bias, mask=mask)

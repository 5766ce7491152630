"""Triton programs of the causal depthwise convolution of width 4.

A program computes one chunk of time for a block of channels of one sequence. It keeps in registers the last three
inputs (forward), or the next three gradients (backward, from the last step to the first); values of another document
are zeroed there. Everything is thus read once, except for three steps at each chunk boundary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from griffin.kernels.triton_functions import DO_NOT_SPECIALIZE, bit, load, program_block, ptr, start_bits

WIDTH = 4


@triton.jit
def _weights(weight, o_r, mask, R):
    """Return the weights of the current token and of those one, two and three steps back."""
    w0, w1 = load(weight + 3 * R + o_r, mask), load(weight + 2 * R + o_r, mask)
    return w0, w1, load(weight + R + o_r, mask), load(weight + o_r, mask)


@triton.jit
def _start(p_starts, t, stride, T, HAS_STARTS: tl.constexpr):
    """Return whether position t, which may lie past the end, is a document start."""
    if HAS_STARTS:
        return tl.load(p_starts + tl.cast(t, tl.int64) * stride, mask=t < T, other=0) != 0
    else:
        return t < 0


@triton.jit
def _convolve(p_x, p_y, at_start, mask, w0, w1, w2, w3, bias, input_bias, x1, x2, x3):
    """One step of `conv_forward`; return the three inputs that the next step reads."""
    x1, x2, x3 = tl.where(at_start > 0, 0.0, x1), tl.where(at_start > 0, 0.0, x2), tl.where(at_start > 0, 0.0, x3)
    x0 = load(p_x, mask) + input_bias
    tl.store(p_y, bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3, mask=mask)
    return x0, x1, x2


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def conv_forward(
    x, weight, bias, input_bias, starts, window, y, T, B, R, L,
    x_t, x_b, starts_t, starts_b, window_t, window_b, y_t, y_b,
    HAS_STARTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_INPUT_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store y [T, B, R] of x [T, B, R], weight [4, R], bias [R] and window [3, B, R], the inputs before position 0.

    input_bias [R] is added to x.
    """
    o_r, mask, b, _, lo, hi = program_block(T, B, R, L, BLOCK)
    p_x, p_y, p_starts = ptr(x, x_t, x_b, lo, b, o_r), ptr(y, y_t, y_b, lo, b, o_r), ptr(starts, 0, starts_b, 0, b, 0)
    w0, w1, w2, w3 = _weights(weight, o_r, mask, R)
    biases = load(bias + o_r, mask)
    input_biases = load(input_bias + o_r, mask) if HAS_INPUT_BIAS else tl.zeros([BLOCK], tl.float32)

    x1, x2, x3 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if lo > 0:
        x1, x2 = load(p_x - x_t, mask) + input_biases, load(p_x - x_t - x_t, mask) + input_biases
        x3 = load(p_x - x_t - x_t - x_t, mask) + input_biases
        one_back, two_back = lo - 1, lo - 2
        x3 = tl.where(_start(p_starts, two_back, starts_t, T, HAS_STARTS), 0.0, x3)
        x2 = tl.where(_start(p_starts, one_back, starts_t, T, HAS_STARTS), 0.0, x2)
        x3 = tl.where(_start(p_starts, one_back, starts_t, T, HAS_STARTS), 0.0, x3)
    elif HAS_WINDOW:
        x1 = load(ptr(window, window_t, window_b, 2, b, o_r), mask)
        x2 = load(ptr(window, window_t, window_b, 1, b, o_r), mask)
        x3 = load(ptr(window, window_t, window_b, 0, b, o_r), mask)

    full = lo + (hi - lo) // UNROLL * UNROLL
    bits = start_bits(p_starts, 0, lo, starts_t, lo, hi, HAS_STARTS, UNROLL, 1)
    for t in tl.range(lo, full, UNROLL, num_stages=STAGES):
        next_bits = start_bits(p_starts, 0, t + UNROLL, starts_t, lo, hi, HAS_STARTS, UNROLL, 1)
        for u in tl.static_range(UNROLL):
            x1, x2, x3 = _convolve(p_x, p_y, bit(bits, u), mask, w0, w1, w2, w3, biases, input_biases, x1, x2, x3)
            p_x, p_y = p_x + x_t, p_y + y_t
        bits = next_bits
    for t in tl.range(full, hi, num_stages=1):
        x1, x2, x3 = _convolve(p_x, p_y, bit(bits, t - full), mask, w0, w1, w2, w3, biases, input_biases, x1, x2, x3)
        p_x, p_y = p_x + x_t, p_y + y_t


@triton.jit
def _correlate(
    p_x, p_grad, p_grad_x, at_start, mask, w0, w1, w2, w3, input_bias, g1, g2, g3,
    grad_bias, grad_input_bias, grad_w0, grad_w1, grad_w2, grad_w3,
):  # fmt: skip
    """One step of `conv_backward`; return the gradients that the previous step reads, and the sums."""
    g0, x = load(p_grad, mask), load(p_x, mask) + input_bias
    grad_x = w0 * g0 + w1 * g1 + w2 * g2 + w3 * g3
    tl.store(p_grad_x, grad_x, mask=mask)
    grad_input_bias += grad_x
    grad_bias, grad_w0, grad_w1 = grad_bias + g0, grad_w0 + x * g0, grad_w1 + x * g1
    grad_w2, grad_w3 = grad_w2 + x * g2, grad_w3 + x * g3
    g1, g2, g3 = tl.where(at_start > 0, 0.0, g0), tl.where(at_start > 0, 0.0, g1), tl.where(at_start > 0, 0.0, g2)
    return g1, g2, g3, grad_bias, grad_input_bias, grad_w0, grad_w1, grad_w2, grad_w3


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def conv_backward(
    x, weight, input_bias, starts, window, grad_y, grad_x, grad_window, grad_sums, T, B, R, L,
    x_t, x_b, starts_t, starts_b, window_t, window_b, grad_t, grad_b, grad_x_t, grad_x_b,
    HAS_STARTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_INPUT_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store grad_x [T, B, R], grad_window [3, B, R], and sums for weight and biases, [chunks, B, 5 or 6, R]."""
    o_r, mask, b, c, lo, hi = program_block(T, B, R, L, BLOCK)
    last = hi - 1
    p_x, p_grad = ptr(x, x_t, x_b, last, b, o_r), ptr(grad_y, grad_t, grad_b, last, b, o_r)
    p_grad_x, p_starts = ptr(grad_x, grad_x_t, grad_x_b, last, b, o_r), ptr(starts, 0, starts_b, 0, b, 0)
    w0, w1, w2, w3 = _weights(weight, o_r, mask, R)

    g1, g2, g3 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for ahead in tl.static_range(3):
        t = hi + 2 - ahead
        valid = mask & (o_r * 0 + t < T)
        g1, g2, g3 = load(ptr(grad_y, grad_t, grad_b, t, b, o_r), valid), g1, g2
        is_start = _start(p_starts, t, starts_t, T, HAS_STARTS)
        g1, g2, g3 = tl.where(is_start, 0.0, g1), tl.where(is_start, 0.0, g2), tl.where(is_start, 0.0, g3)

    grad_bias, grad_w0 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    grad_w1, grad_w2, grad_w3, grad_input_bias = grad_bias, grad_bias, grad_bias, grad_bias
    input_biases = load(input_bias + o_r, mask) if HAS_INPUT_BIAS else tl.zeros([BLOCK], tl.float32)
    full = (hi - lo) // UNROLL * UNROLL
    bits = start_bits(p_starts, 0, last, starts_t, lo, hi, HAS_STARTS, UNROLL, -1)
    for k in tl.range(0, full, UNROLL, num_stages=STAGES):
        next_bits = start_bits(p_starts, 0, last - (k + UNROLL), starts_t, lo, hi, HAS_STARTS, UNROLL, -1)
        for u in tl.static_range(UNROLL):
            g1, g2, g3, grad_bias, grad_input_bias, grad_w0, grad_w1, grad_w2, grad_w3 = _correlate(
                p_x, p_grad, p_grad_x, bit(bits, u), mask, w0, w1, w2, w3, input_biases, g1, g2, g3,
                grad_bias, grad_input_bias, grad_w0, grad_w1, grad_w2, grad_w3,
            )  # fmt: skip
            p_x, p_grad, p_grad_x = p_x - x_t, p_grad - grad_t, p_grad_x - grad_x_t
        bits = next_bits
    for k in tl.range(full, hi - lo, num_stages=1):
        g1, g2, g3, grad_bias, grad_input_bias, grad_w0, grad_w1, grad_w2, grad_w3 = _correlate(
            p_x, p_grad, p_grad_x, bit(bits, k - full), mask, w0, w1, w2, w3, input_biases, g1, g2, g3,
            grad_bias, grad_input_bias, grad_w0, grad_w1, grad_w2, grad_w3,
        )  # fmt: skip
        p_x, p_grad, p_grad_x = p_x - x_t, p_grad - grad_t, p_grad_x - grad_x_t

    if HAS_WINDOW:  # noqa: SIM102 (the first condition is known at compile time)
        if lo == 0:
            for back in tl.static_range(3):
                x0 = load(ptr(window, window_t, window_b, 2 - back, b, o_r), mask)
                grad = w1 * g1 + w2 * g2 + w3 * g3
                tl.store(grad_window + ((2 - back) * B + b) * R + o_r, grad, mask=mask)
                grad_w1, grad_w2, grad_w3 = grad_w1 + x0 * g1, grad_w2 + x0 * g2, grad_w3 + x0 * g3
                g1, g2, g3 = tl.zeros([BLOCK], tl.float32), g1, g2
    p_sums = grad_sums + (c * B + b) * (6 if HAS_INPUT_BIAS else 5) * R + o_r
    tl.store(p_sums, grad_w3, mask=mask)
    tl.store(p_sums + R, grad_w2, mask=mask)
    tl.store(p_sums + 2 * R, grad_w1, mask=mask)
    tl.store(p_sums + 3 * R, grad_w0, mask=mask)
    tl.store(p_sums + 4 * R, grad_bias, mask=mask)
    if HAS_INPUT_BIAS:
        tl.store(p_sums + 5 * R, grad_input_bias, mask=mask)

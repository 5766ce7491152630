"""Triton programs of the diagonal linear recurrence h_t = a_t h_{t-1} + b_t, with or without RG-LRU gates.

A program computes one chunk of time for a block of channels of one sequence, with the state in registers. A sequence
in one chunk needs only `scan_forward` and `scan_backward`. With several chunks, `chunk_summaries` first computes for
all chunks in parallel (product of a, end state from a zero state), and `chunk_carries` chains these into the initial
state of each chunk. The backward pass does the same in reverse for the gradient that flows through time.

With GATED, `term` is the RG-LRU's x, the gates are pre-sigmoid, `rate` is -8 softplus(decay), and `gate_bias`
[2, R] is added to input_gate and gate:
    log a = rate sigmoid(gate)    b = sqrt(1 - a^2) sigmoid(input_gate) term
Otherwise `term` is b and `gate` is a. At a document's first token a = 0, and the square root is 1.

Tensors [T, B, R] have arbitrary strides *_t and *_b and contiguous channels; states [chunks, B, R], or [B, R] for a
single chunk, are contiguous. For an absent optional tensor a program is passed another one, which it does not access.
Arithmetic is float32, except for products over chunks and their chaining, which are float64.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from griffin.kernels.gelu_triton import LOG2_E, gelu, sigmoid
from griffin.kernels.recurrence import MIN_SQRT_ARGUMENT
from griffin.kernels.triton_functions import DO_NOT_SPECIALIZE, bit, in_int64, load, program_block, ptr, start_bits

START_LOG2 = tl.constexpr(-1000.0)  # added to log2 a: exp2 gives exactly 0
# 1 - a^2 = -expm1(2 log a) as a polynomial in w = log2 a for w > NEAR_ONE, where the difference would cancel. Its
# relative truncation error is at most 4e-8, at NEAR_ONE.
NEAR_ONE = tl.constexpr(-0.2 / math.log(2))
SERIES_1, SERIES_2, SERIES_3, SERIES_4, SERIES_5, SERIES_6, SERIES_7 = (
    tl.constexpr(-((2 * math.log(2)) ** k) / math.factorial(k)) for k in range(1, 8)
)
TINY = tl.constexpr(1e-30)
MAX_INVERSE = tl.constexpr(MIN_SQRT_ARGUMENT**-0.5)  # bound on 1 / sqrt(1 - a^2) in the derivative


@triton.jit
def _decay(gate, rate, at_start):
    """Return r, a, m = sqrt(1 - a^2) and the bounded 1 / m from the pre-sigmoid gate."""
    r = sigmoid(gate)
    w = r * rate + at_start * START_LOG2
    a = tl.exp2(w)
    series = w * SERIES_7 + SERIES_6
    series = w * series + SERIES_5
    series = w * series + SERIES_4
    series = w * series + SERIES_3
    series = w * series + SERIES_2
    series = w * series + SERIES_1
    square = tl.where(w > NEAR_ONE, w * series, 1.0 - a * a)
    inverse = tl.rsqrt(tl.maximum(square, TINY))
    return r, a, square * inverse, tl.minimum(inverse, MAX_INVERSE)


@triton.jit
def _load_coefficient(p_gate, at_start, mask):
    return tl.where(at_start > 0, 0.0, load(p_gate, mask))


@triton.jit
def _load_terms(p_term, p_input, p_gate, at_start, mask, rate, input_bias, gate_bias, GATED: tl.constexpr):
    """Return a_t and b_t."""
    if GATED:
        _, a, m, _ = _decay(load(p_gate, mask) + gate_bias, rate, at_start)
        return a, m * (sigmoid(load(p_input, mask) + input_bias) * load(p_term, mask))
    else:
        return _load_coefficient(p_gate, at_start, mask), load(p_term, mask)


@triton.jit
def _summarize_step(
    p_term, p_input, p_gate, p_branch, p_grad, at_start, mask, rate, input_bias, gate_bias, product, end,
    GATED: tl.constexpr, HAS_BRANCH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """One step of `chunk_summaries`."""
    if REVERSE:
        if GATED:
            _, a, _, _ = _decay(load(p_gate, mask) + gate_bias, rate, at_start)
        else:
            a = _load_coefficient(p_gate, at_start, mask)
        grad = load(p_grad, mask)
        if HAS_BRANCH:
            factor, _ = gelu(load(p_branch, mask))
            grad *= factor
        return product * a.to(tl.float64), a * (grad + end)
    else:
        a, b = _load_terms(p_term, p_input, p_gate, at_start, mask, rate, input_bias, gate_bias, GATED)
        return product * a.to(tl.float64), a * end + b


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def chunk_summaries(
    term, input_gate, gate, rate, gate_bias, branch, starts, grad_y, product, end,
    first_is_start, T, B, R, L,
    term_t, term_b, input_t, input_b, gate_t, gate_b, branch_t, branch_b, starts_t, starts_b, grad_t, grad_b,
    REVERSE: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BRANCH: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store for each chunk the product of a and the end from zero, both [chunks, B, R].

    The end is the state after the chunk's last step; with REVERSE, a_t dL/dh_t at its first step.
    """
    o_r, mask, b, c, lo, hi = program_block(T, B, R, L, BLOCK)
    STEP: tl.constexpr = -1 if REVERSE else 1
    begin = hi - 1 if REVERSE else lo
    rates = load(rate + o_r, mask) * LOG2_E if GATED else tl.zeros([BLOCK], tl.float32)
    input_biases = load(gate_bias + o_r, mask) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    gate_biases = load(gate_bias + R + o_r, mask) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    p_term, p_input = ptr(term, term_t, term_b, begin, b, o_r), ptr(input_gate, input_t, input_b, begin, b, o_r)
    p_gate, p_branch = ptr(gate, gate_t, gate_b, begin, b, o_r), ptr(branch, branch_t, branch_b, begin, b, o_r)
    p_grad, p_starts = ptr(grad_y, grad_t, grad_b, begin, b, o_r), ptr(starts, starts_t, starts_b, 0, b, 0)
    term_t, input_t, gate_t = in_int64(STEP * term_t, STEP * input_t, STEP * gate_t)
    branch_t, grad_t, starts_t = in_int64(STEP * branch_t, STEP * grad_t, starts_t)

    full = (hi - lo) // UNROLL * UNROLL
    products = tl.full([BLOCK], 1.0, tl.float64)  # for a near 1, float32 roundings would accumulate
    ends = tl.zeros([BLOCK], tl.float32)
    bits = start_bits(p_starts, first_is_start, begin, starts_t, lo, hi, HAS_STARTS, UNROLL, STEP)
    for k in tl.range(0, full, UNROLL, num_stages=STAGES):
        # Prefetched one round ahead: nothing else hides the latency of such a small load.
        next_bits = start_bits(
            p_starts, first_is_start, begin + STEP * (k + UNROLL), starts_t, lo, hi, HAS_STARTS, UNROLL, STEP
        )
        for u in tl.static_range(UNROLL):
            products, ends = _summarize_step(
                p_term, p_input, p_gate, p_branch, p_grad, bit(bits, u), mask, rates, input_biases, gate_biases,
                products, ends, GATED, HAS_BRANCH, REVERSE,
            )  # fmt: skip
            p_term, p_input = p_term + term_t, p_input + input_t
            p_gate, p_branch = p_gate + gate_t, p_branch + branch_t
            p_grad += grad_t
        bits = next_bits
    for k in tl.range(full, hi - lo, num_stages=1):
        products, ends = _summarize_step(
            p_term, p_input, p_gate, p_branch, p_grad, bit(bits, k - full), mask, rates, input_biases, gate_biases,
            products, ends, GATED, HAS_BRANCH, REVERSE,
        )  # fmt: skip
        p_term, p_input = p_term + term_t, p_input + input_t
        p_gate, p_branch = p_gate + gate_t, p_branch + branch_t
        p_grad += grad_t
    o_state = (c * B + b) * R + o_r
    tl.store(product + o_state, products, mask=mask)
    tl.store(end + o_state, ends, mask=mask)


@triton.jit
def _combine(a, b, next_a, next_b):
    return a * next_a, next_a * b + next_b


@triton.jit(do_not_specialize=["B", "chunks"])
def chunk_carries(
    product, end, first, carries, B, R, chunks, REVERSE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Store carries [chunks, B, R], the initial state of each chunk; that of the first chunk is `first` [B, R].

    With REVERSE, chunks are chained from the last to the first. The final chunk's end is not needed. CHUNKS chunks are
    chained at a time by an associative scan: a sequential chain would take longer than the chunks themselves.
    """
    o_r, mask, b, _, _, _ = program_block(1, B, R, 1, BLOCK)
    o_state, stride_c = b * R + o_r, tl.cast(B, tl.int64) * R
    STEP: tl.constexpr = -1 if REVERSE else 1
    begin = chunks - 1 if REVERSE else 0
    carry = load(first + o_state, mask).to(tl.float64)
    tl.store(carries + begin * stride_c + o_state, carry, mask=mask)
    o_k = tl.arange(0, CHUNKS)
    for k in tl.range(0, chunks - 1, CHUNKS, num_stages=1):
        o_chunk = ((begin + STEP * (k + o_k)).to(tl.int64) * stride_c)[:, None] + o_state[None, :]  # [CHUNKS, BLOCK]
        valid = (k + o_k < chunks - 1)[:, None] & mask[None, :]
        products = tl.load(product + o_chunk, mask=valid, other=1.0)
        ends = tl.load(end + o_chunk, mask=valid, other=0.0).to(tl.float64)
        products, ends = tl.associative_scan((products, ends), 0, _combine)
        states = products * carry[None, :] + ends
        tl.store(carries + o_chunk + STEP * stride_c, states, mask=valid)
        carry = tl.sum(tl.where((o_k == CHUNKS - 1)[:, None], states, 0.0), axis=0)


@triton.jit
def _forward_step(
    p_term, p_input, p_gate, p_branch, p_y, p_states, at_start, mask, rate, input_bias, gate_bias, h,
    GATED: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_STATES: tl.constexpr,
):  # fmt: skip
    """One step of `scan_forward`."""
    a, b = _load_terms(p_term, p_input, p_gate, at_start, mask, rate, input_bias, gate_bias, GATED)
    h = a * h + b
    y = h
    if HAS_BRANCH:
        factor, _ = gelu(load(p_branch, mask))
        y = h * factor
    tl.store(p_y, y, mask=mask)
    if HAS_STATES:
        tl.store(p_states, h, mask=mask)
    return h


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def scan_forward(
    term, input_gate, gate, rate, gate_bias, branch, starts, first_states, y, states, last_state,
    first_is_start, T, B, R, L,
    term_t, term_b, input_t, input_b, gate_t, gate_b, branch_t, branch_b, starts_t, starts_b,
    y_t, y_b, states_t, states_b,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_STATES: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store y [T, B, R] = h, or h gelu(branch) and h in `states`; and last_state [B, R].

    first_states [chunks, B, R] are the initial states of the chunks.
    """
    o_r, mask, b, c, lo, hi = program_block(T, B, R, L, BLOCK)
    rates = load(rate + o_r, mask) * LOG2_E if GATED else tl.zeros([BLOCK], tl.float32)
    input_biases = load(gate_bias + o_r, mask) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    gate_biases = load(gate_bias + R + o_r, mask) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    p_term, p_input = ptr(term, term_t, term_b, lo, b, o_r), ptr(input_gate, input_t, input_b, lo, b, o_r)
    p_gate, p_branch = ptr(gate, gate_t, gate_b, lo, b, o_r), ptr(branch, branch_t, branch_b, lo, b, o_r)
    p_y, p_states = ptr(y, y_t, y_b, lo, b, o_r), ptr(states, states_t, states_b, lo, b, o_r)
    p_starts = ptr(starts, starts_t, starts_b, 0, b, 0)
    term_t, input_t, gate_t = in_int64(term_t, input_t, gate_t)
    branch_t, y_t, states_t = in_int64(branch_t, y_t, states_t)

    full = lo + (hi - lo) // UNROLL * UNROLL
    h = load(first_states + (c * B + b) * R + o_r, mask)
    bits = start_bits(p_starts, first_is_start, lo, starts_t, lo, hi, HAS_STARTS, UNROLL, 1)
    for t in tl.range(lo, full, UNROLL, num_stages=STAGES):
        next_bits = start_bits(p_starts, first_is_start, t + UNROLL, starts_t, lo, hi, HAS_STARTS, UNROLL, 1)
        for u in tl.static_range(UNROLL):
            h = _forward_step(
                p_term, p_input, p_gate, p_branch, p_y, p_states, bit(bits, u), mask, rates, input_biases, gate_biases,
                h, GATED, HAS_BRANCH, HAS_STATES,
            )  # fmt: skip
            p_term, p_input, p_gate = p_term + term_t, p_input + input_t, p_gate + gate_t
            p_branch, p_y, p_states = p_branch + branch_t, p_y + y_t, p_states + states_t
        bits = next_bits
    for t in tl.range(full, hi, num_stages=1):
        h = _forward_step(
            p_term, p_input, p_gate, p_branch, p_y, p_states, bit(bits, t - full), mask, rates, input_biases,
            gate_biases, h, GATED, HAS_BRANCH, HAS_STATES,
        )  # fmt: skip
        p_term, p_input, p_gate = p_term + term_t, p_input + input_t, p_gate + gate_t
        p_branch, p_y, p_states = p_branch + branch_t, p_y + y_t, p_states + states_t
    if hi == T:
        tl.store(last_state + b * R + o_r, h, mask=mask)


@triton.jit
def _backward_step(
    p_term, p_input, p_gate, p_branch, p_grad, p_grad_term, p_grad_input, p_grad_gate, p_grad_branch,
    at_start, mask, rate, slope, input_bias, gate_bias, previous, h, carry, grad_rate, sum_input, sum_gate,
    GATED: tl.constexpr, HAS_BRANCH: tl.constexpr,
):  # fmt: skip
    """One step of `scan_backward`, given h_{t-1} and h_t: return a_t dL/dh_t, and accumulated gradients."""
    grad = load(p_grad, mask)
    if HAS_BRANCH:
        factor, slope_of_factor = gelu(load(p_branch, mask))
        tl.store(p_grad_branch, grad * h * slope_of_factor, mask=mask)
        grad *= factor
    grad += carry
    if GATED:
        r, a, m, inverse_m = _decay(load(p_gate, mask) + gate_bias, rate, at_start)
        i = sigmoid(load(p_input, mask) + input_bias)
        x = load(p_term, mask)
        ix = i * x
        grad_log_r = a * grad * (previous - ix * a * inverse_m) * r  # without the factor `rate`
        grad_rate += grad_log_r
        grad_i = grad * m * i
        tl.store(p_grad_term, grad_i, mask=mask)
        grad_input, grad_gate = grad_i * (x - ix), grad_log_r * (slope - slope * r)
        tl.store(p_grad_input, grad_input, mask=mask)
        tl.store(p_grad_gate, grad_gate, mask=mask)
        sum_input += grad_input
        sum_gate += grad_gate
    else:
        a = _load_coefficient(p_gate, at_start, mask)
        tl.store(p_grad_term, grad, mask=mask)
        tl.store(p_grad_gate, tl.where(at_start > 0, 0.0, grad * previous), mask=mask)
    return a * grad, grad_rate, sum_input, sum_gate


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def scan_backward(
    term, input_gate, gate, rate, gate_bias, branch, starts, initial_state, states, grad_y, first_carries,
    grad_term, grad_input_gate, grad_gate, grad_branch, grad_rates, grad_biases, grad_initial_state,
    first_is_start, T, B, R, L,
    term_t, term_b, input_t, input_b, gate_t, gate_b, branch_t, branch_b, starts_t, starts_b,
    states_t, states_b, grad_t, grad_b, grad_term_t, grad_term_b, grad_input_t, grad_input_b,
    grad_gate_t, grad_gate_b, grad_branch_t, grad_branch_b,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_STARTS: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store gradients of all inputs.

    Those of the rate, [chunks, B, R], and of both biases, [2, chunks, B, R], are sums over each chunk.

    first_carries [chunks, B, R] is the gradient that flows into each chunk's last state from later steps.
    """
    o_r, mask, b, c, lo, hi = program_block(T, B, R, L, BLOCK)
    last = hi - 1
    rates = load(rate + o_r, mask) * LOG2_E if GATED else tl.zeros([BLOCK], tl.float32)
    input_biases = load(gate_bias + o_r, mask) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    gate_biases = load(gate_bias + R + o_r, mask) if HAS_BIAS else tl.zeros([BLOCK], tl.float32)
    p_term, p_input = ptr(term, term_t, term_b, last, b, o_r), ptr(input_gate, input_t, input_b, last, b, o_r)
    p_gate, p_branch = ptr(gate, gate_t, gate_b, last, b, o_r), ptr(branch, branch_t, branch_b, last, b, o_r)
    p_states, p_grad = ptr(states, states_t, states_b, last, b, o_r), ptr(grad_y, grad_t, grad_b, last, b, o_r)
    p_grad_term = ptr(grad_term, grad_term_t, grad_term_b, last, b, o_r)
    p_grad_input = ptr(grad_input_gate, grad_input_t, grad_input_b, last, b, o_r)
    p_grad_gate = ptr(grad_gate, grad_gate_t, grad_gate_b, last, b, o_r)
    p_grad_branch = ptr(grad_branch, grad_branch_t, grad_branch_b, last, b, o_r)
    p_starts = ptr(starts, starts_t, starts_b, 0, b, 0)
    term_t, input_t, gate_t = in_int64(term_t, input_t, gate_t)
    branch_t, states_t, grad_t = in_int64(branch_t, states_t, grad_t)
    grad_term_t, grad_input_t, grad_gate_t = in_int64(grad_term_t, grad_input_t, grad_gate_t)
    grad_branch_t, _, _ = in_int64(grad_branch_t, 0, 0)

    # Position 0 has no previous stored state: the second loop handles it.
    full = (hi - lo - tl.where(lo == 0, 1, 0)) // UNROLL * UNROLL
    o_state = (c * B + b) * R + o_r
    slopes = rates / LOG2_E  # d log a / d r
    carry = load(first_carries + o_state, mask)
    grad_rate, sum_input = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    sum_gate = tl.zeros([BLOCK], tl.float32)
    h = load(p_states, mask)
    bits = start_bits(p_starts, first_is_start, last, starts_t, lo, hi, HAS_STARTS, UNROLL, -1)
    for k in tl.range(0, full, UNROLL, num_stages=STAGES):
        next_bits = start_bits(p_starts, first_is_start, last - (k + UNROLL), starts_t, lo, hi, HAS_STARTS, UNROLL, -1)
        for u in tl.static_range(UNROLL):
            p_states -= states_t
            previous = load(p_states, mask)
            carry, grad_rate, sum_input, sum_gate = _backward_step(
                p_term, p_input, p_gate, p_branch, p_grad, p_grad_term, p_grad_input, p_grad_gate, p_grad_branch,
                bit(bits, u), mask, rates, slopes, input_biases, gate_biases, previous, h, carry, grad_rate,
                sum_input, sum_gate, GATED, HAS_BRANCH,
            )  # fmt: skip
            h = previous
            p_term, p_input, p_gate = p_term - term_t, p_input - input_t, p_gate - gate_t
            p_branch, p_grad, p_grad_term = p_branch - branch_t, p_grad - grad_t, p_grad_term - grad_term_t
            p_grad_input, p_grad_gate = p_grad_input - grad_input_t, p_grad_gate - grad_gate_t
            p_grad_branch -= grad_branch_t
        bits = next_bits
    for k in tl.range(full, hi - lo, num_stages=1):
        if last - k > 0:
            p_states -= states_t
            previous = load(p_states, mask)
        else:
            previous = load(initial_state + b * R + o_r, mask)
        carry, grad_rate, sum_input, sum_gate = _backward_step(
            p_term, p_input, p_gate, p_branch, p_grad, p_grad_term, p_grad_input, p_grad_gate, p_grad_branch,
            bit(bits, k - full), mask, rates, slopes, input_biases, gate_biases, previous, h, carry, grad_rate,
            sum_input, sum_gate, GATED, HAS_BRANCH,
        )  # fmt: skip
        h = previous
        p_term, p_input, p_gate = p_term - term_t, p_input - input_t, p_gate - gate_t
        p_branch, p_grad, p_grad_term = p_branch - branch_t, p_grad - grad_t, p_grad_term - grad_term_t
        p_grad_input, p_grad_gate = p_grad_input - grad_input_t, p_grad_gate - grad_gate_t
        p_grad_branch -= grad_branch_t
    if GATED:
        tl.store(grad_rates + o_state, grad_rate, mask=mask)
    if HAS_BIAS:
        chunks = tl.cdiv(T, L)
        tl.store(grad_biases + o_state, sum_input, mask=mask)
        tl.store(grad_biases + tl.cast(chunks, tl.int64) * B * R + o_state, sum_gate, mask=mask)
    if lo == 0:
        tl.store(grad_initial_state + b * R + o_r, carry, mask=mask)

"""Triton programs of rotary embedding: tiles of ROWS heads by a quarter of a head, of which there are four.

The H + 2 heads of a token are its queries, its key and its value; QUARTER is a power of 2, of which Q dims are there.
Arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

DO_NOT_SPECIALIZE = ["N", "B"]  # must not compile anew


@triton.jit
def _place(N, H, Q, ROWS: tl.constexpr, QUARTER: tl.constexpr):
    """Return the tokens and heads [ROWS, 1] and dims [1, QUARTER] of a tile, and the mask of those that exist."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = o_row // (H + 2), o_row % (H + 2)
    o_q = tl.arange(0, QUARTER)[None, :]
    return token.to(tl.int64), head, o_q, (token < N) & (o_q < Q)


@triton.jit
def _load(p, mask):
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(p, mask, Q, first, second, third, fourth):
    tl.store(p, first, mask=mask)
    tl.store(p + Q, second, mask=mask)
    tl.store(p + 2 * Q, third, mask=mask)
    tl.store(p + 3 * Q, fourth, mask=mask)


@triton.jit
def _turned(cos, sin, token, head, o_q, mask, H, Q, first, second, SIGN: tl.constexpr):
    """The first two quarters of heads, those of values as they are."""
    o_angle = token * Q + o_q
    cosine, sine = _load(cos + o_angle, mask), _load(sin + o_angle, mask) * SIGN
    turns = head <= H
    return (
        tl.where(turns, first * cosine - second * sine, first),
        tl.where(turns, second * cosine + first * sine, second),
    )


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def rotary_forward(qkv, cos, sin, q, k, v, N, H, Q, qkv_n, ROWS: tl.constexpr, QUARTER: tl.constexpr):
    """q [N, H, 4 Q], k and v [N, 4 Q] of qkv [N, (H + 2) 4 Q], whose rows are qkv_n apart, and angles [N, Q]."""
    token, head, o_q, mask = _place(N, H, Q, ROWS, QUARTER)
    p_qkv = qkv + token * qkv_n + head * 4 * Q + o_q
    first, second = _load(p_qkv, mask), _load(p_qkv + Q, mask)
    third, fourth = _load(p_qkv + 2 * Q, mask), _load(p_qkv + 3 * Q, mask)
    first, second = _turned(cos, sin, token, head, o_q, mask, H, Q, first, second, 1.0)
    o_one = token * 4 * Q + o_q
    _store(q + (token * H + head) * 4 * Q + o_q, mask & (head < H), Q, first, second, third, fourth)
    _store(k + o_one, mask & (head == H), Q, first, second, third, fourth)
    _store(v + o_one, mask & (head == H + 1), Q, first, second, third, fourth)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def rotary_backward(
    grad_q, grad_k, grad_v, cos, sin, grad_qkv, N, B, H, Q,
    grad_q_t, grad_q_b, grad_q_h, grad_k_t, grad_k_b, grad_v_t, grad_v_b,
    ROWS: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    """grad_qkv [N, (H + 2) 4 Q] of gradients of any strides NAME_t, NAME_b and NAME_h, whose dims adjoin; N = T B."""
    token, head, o_q, mask = _place(N, H, Q, ROWS, QUARTER)
    t, b = token // B, token % B
    p_q = grad_q + t * grad_q_t + b * grad_q_b + head.to(tl.int64) * grad_q_h + o_q
    p_k = grad_k + t * grad_k_t + b * grad_k_b + o_q
    p_v = grad_v + t * grad_v_t + b * grad_v_b + o_q
    is_q, is_k, is_v = mask & (head < H), mask & (head == H), mask & (head == H + 1)
    first = _load(p_q, is_q) + _load(p_k, is_k) + _load(p_v, is_v)
    second = _load(p_q + Q, is_q) + _load(p_k + Q, is_k) + _load(p_v + Q, is_v)
    third = _load(p_q + 2 * Q, is_q) + _load(p_k + 2 * Q, is_k) + _load(p_v + 2 * Q, is_v)
    fourth = _load(p_q + 3 * Q, is_q) + _load(p_k + 3 * Q, is_k) + _load(p_v + 3 * Q, is_v)
    first, second = _turned(cos, sin, token, head, o_q, mask, H, Q, first, second, -1.0)
    _store(grad_qkv + (token * (H + 2) + head) * 4 * Q + o_q, mask, Q, first, second, third, fourth)

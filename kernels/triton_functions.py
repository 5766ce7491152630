"""What Triton programs share that walk along time for a block of channels of one sequence."""

from __future__ import annotations

import triton
import triton.language as tl

# What changes from call to call must not compile anew; whether other strides and R are multiples of 16 must be known,
# so that loads become asynchronous copies.
CHANGING = ["T", "B", "L", "first_is_start", "starts_t", "starts_b"]


@triton.jit
def place(T, B, R, L, BLOCK: tl.constexpr):
    """Channels [BLOCK], the mask of those there are, sequence, chunk, and the chunk's span of time."""
    blocks = tl.cdiv(R, BLOCK)
    program = tl.program_id(0)
    o_r = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    b, c = (program // blocks) % B, (program // blocks) // B
    lo = c * L
    return o_r, o_r < R, tl.cast(b, tl.int64), tl.cast(c, tl.int64), lo, tl.minimum(lo + L, T)


@triton.jit
def at(tensor, stride_t, stride_b, t, b, offset):
    """Pointers to the channels of a sequence at position t."""
    return tensor + b * stride_b + tl.cast(t, tl.int64) * stride_t + offset


@triton.jit
def wide(stride, another, third):
    """The strides that pointers are moved by in 64 bits, once instead of at every move."""
    return tl.cast(stride, tl.int64), tl.cast(another, tl.int64), tl.cast(third, tl.int64)


@triton.jit
def row(p, mask):
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def flags(
    p_starts, first_is_start, t, stride, lo, hi, HAS_STARTS: tl.constexpr, UNROLL: tl.constexpr, STEP: tl.constexpr
):
    """Document starts of UNROLL steps from t on, in direction STEP, as bits of an integer."""
    if HAS_STARTS:
        o_u = tl.arange(0, UNROLL)
        o_t = t + STEP * o_u
        starts = tl.load(p_starts + o_t.to(tl.int64) * stride, mask=(o_t >= lo) & (o_t < hi), other=0)
        return tl.sum(starts.to(tl.int32) << o_u, axis=0)
    else:
        u_first = tl.where(t * STEP <= 0, t * -STEP, UNROLL)  # place of position 0 among these steps
        return tl.where(u_first < UNROLL, first_is_start << tl.minimum(u_first, UNROLL), 0)


@triton.jit
def flag(bits, u):
    return ((bits >> u) & 1).to(tl.float32)

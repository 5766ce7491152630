"""Triton device functions shared by programs that iterate over time for a block of channels of one sequence."""

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that change between calls must not trigger a recompilation. The compiler must know whether R and the other
# strides are multiples of 16, to turn loads into asynchronous copies.
DO_NOT_SPECIALIZE = ["T", "B", "L", "first_is_start", "starts_t", "starts_b"]


@triton.jit
def program_block(T, B, R, L, BLOCK: tl.constexpr):
    """Return channels [BLOCK], their mask, sequence, chunk, and the chunk's time range [lo, hi) of this program."""
    blocks = tl.cdiv(R, BLOCK)
    program = tl.program_id(0)
    o_r = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    b, c = (program // blocks) % B, (program // blocks) // B
    lo = c * L
    return o_r, o_r < R, tl.cast(b, tl.int64), tl.cast(c, tl.int64), lo, tl.minimum(lo + L, T)


@triton.jit
def ptr(tensor, stride_t, stride_b, t, b, offset):
    """Return pointers to the channels of sequence b at position t."""
    return tensor + b * stride_b + tl.cast(t, tl.int64) * stride_t + offset


@triton.jit
def in_int64(first, second, third):
    """Convert the strides that advance pointers to 64 bits, once instead of at every step."""
    return tl.cast(first, tl.int64), tl.cast(second, tl.int64), tl.cast(third, tl.int64)


@triton.jit
def load(p, mask):
    """Load channels as float32, 0 where masked."""
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def start_bits(
    p_starts, first_is_start, t, stride, lo, hi, HAS_STARTS: tl.constexpr, UNROLL: tl.constexpr, STEP: tl.constexpr
):
    """Return the document starts of the UNROLL steps from t on, in direction STEP, as bits of an integer."""
    if HAS_STARTS:
        o_u = tl.arange(0, UNROLL)
        o_t = t + STEP * o_u
        starts = tl.load(p_starts + o_t.to(tl.int64) * stride, mask=(o_t >= lo) & (o_t < hi), other=0)
        return tl.sum(starts.to(tl.int32) << o_u, axis=0)
    else:
        u_first = tl.where(t * STEP <= 0, t * -STEP, UNROLL)  # index of position 0 among these steps
        return tl.where(u_first < UNROLL, first_is_start << tl.minimum(u_first, UNROLL), 0)


@triton.jit
def bit(bits, u):
    """Return bit u as 0.0 or 1.0."""
    return ((bits >> u) & 1).to(tl.float32)

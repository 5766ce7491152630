"""Triton programs of the loss: statistics of each row of a chunk of logits, and the gradient in place of the logits.

Both read what they need of a row once. On an H100, memory gives a scheduler a half-precision logit of each lane of a
warp every 20 cycles or so, of which exp2 and a reciprocal take 8 each.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-1e38)  # below every logit: the difference of two infinities is not a number
# Ranks and chunks must not compile anew; whether rows and their ends are aligned must be known, for loads of 16 bytes.
CHANGING = ["valid", "first"]


# exp2 and rsqrt are one instruction, exp and division five to eight.
@triton.jit
def _tanh(x):
    shrunk = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    root = tl.rsqrt(1.0 + shrunk)
    ratio = (1.0 - shrunk) * (root * root)
    return tl.where(x < 0, -ratio, ratio)


@triton.jit
def _capped(x, soft_cap, inverse_cap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        return _tanh(x * inverse_cap) * soft_cap
    else:
        return x


@triton.jit(do_not_specialize=CHANGING)
def statistics(
    logits, labels, maxima, sums, targets, columns, row_stride, valid, first, soft_cap, inverse_cap,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A row's maximum, its sum of exp(logit - maximum), and the target's logit, 0 where that is of another shard.

    Each LANE adjoining columns of a block, which one thread holds, have a maximum and a sum of their own until the end:
    threads need not wait for one another, and an element takes little more than one exp2.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    p_row = logits + row * row_stride
    o_v = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]  # [BLOCK / LANE, LANE]
    highest = tl.full([BLOCK // LANE], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // LANE], tl.float32)
    for start in tl.range(0, valid, BLOCK, num_stages=STAGES):
        x = tl.load(p_row + start + o_v, mask=start + o_v < columns, other=0.0).to(tl.float32)
        x = tl.where(start + o_v < valid, _capped(x, soft_cap, inverse_cap, HAS_CAP), float("-inf"))
        higher = tl.maximum(highest, tl.max(x, axis=1))
        total = total * tl.exp2((highest - higher) * LOG2_E) + tl.sum(tl.exp2((x - higher[:, None]) * LOG2_E), axis=1)
        highest = higher
    maximum = tl.max(highest, axis=0)
    total_of_row = tl.sum(total * tl.exp2((highest - maximum) * LOG2_E), axis=0)
    place = tl.load(labels + row) - first
    is_there = (place >= 0) & (place < valid)
    target = _capped(tl.load(p_row + place, mask=is_there, other=0.0).to(tl.float32), soft_cap, inverse_cap, HAS_CAP)
    tl.store(maxima + row, tl.where(maximum > LOWEST, maximum, float("-inf")))
    tl.store(sums + row, total_of_row)
    tl.store(targets + row, tl.where(is_there, target, 0.0))


@triton.jit(do_not_specialize=CHANGING)
def gradient(
    logits, labels, maxima, scales, weights, columns, row_stride, valid, first, soft_cap, inverse_cap,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale exp(logit - maximum), less the weight at the target, through the soft cap; in place of a block of a row."""
    blocks = tl.cdiv(columns, BLOCK)
    row, block = tl.cast(tl.program_id(0) // blocks, tl.int64), tl.program_id(0) % blocks
    o_v = block * BLOCK + tl.arange(0, BLOCK)
    p = logits + row * row_stride + o_v
    mask = o_v < columns
    x = _capped(tl.load(p, mask=mask, other=0.0).to(tl.float32), soft_cap, inverse_cap, HAS_CAP)
    place = tl.load(labels + row) - first
    slope = tl.exp2((x - tl.load(maxima + row)) * LOG2_E) * tl.load(scales + row)
    slope -= tl.where(o_v == place, tl.load(weights + row), 0.0)
    if HAS_CAP:
        ratio = x * inverse_cap
        slope *= 1.0 - ratio * ratio
    tl.store(p, tl.where(o_v < valid, slope, 0.0), mask=mask)

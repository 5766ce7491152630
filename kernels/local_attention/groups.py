"""How often FlexAttention's key/value head is repeated, so that its backward occupies all multiprocessors.

One program of the backward computes the gradients of a block of keys from all query heads that share the key/value
head. With a single one there are few such programs, and each takes long. With G copies of the head, each shared by H/G
query heads, there are G times as many; autograd sums the gradients of the copies.
"""

from __future__ import annotations

import heapq
import math
from functools import cache

from torch import Tensor

BLOCK = 128  # queries and keys of a block of the mask
BALANCED = 1.11  # longest over mean time of the multiprocessors at which no further groups are made
KEY_PRODUCTS, QUERY_PRODUCTS = 4, 3  # of each block of scores, in a program of keys and in one of queries


def visited_blocks(length: int, window: int | None) -> list[int]:
    """Return the blocks of keys that each block of queries visits, in a sequence of one document."""
    count = math.ceil(length / BLOCK)
    reach = count if window is None else math.ceil((window - 1) / BLOCK)
    return [min(block, reach) + 1 for block in range(count)]


@cache
def backward_imbalance(
    batch: int, heads: int, groups: int, length: int, window: int | None, head_dim: int, multiprocessors: int
) -> float:
    """Return the longest over the mean time of multiprocessors in the backward with `groups` key/value heads.

    Programs start in the order of their number, on whichever multiprocessor is free: for each key/value head and
    sequence those of keys, then those of queries. They take 128 keys or queries, or 64 if heads are wider than 128, as
    PyTorch chooses on an H100.
    """
    blocks = visited_blocks(length, window)
    parts = 1 if head_dim <= 128 else 2  # programs per block
    shared = heads // groups
    keys = [KEY_PRODUCTS * shared * seen / parts for seen in reversed(blocks) for _ in range(parts)]
    queries = [QUERY_PRODUCTS * seen / parts for _ in range(shared) for seen in blocks for _ in range(parts)]
    work = (keys + queries) * (batch * groups)
    busy = [0.0] * multiprocessors
    for seconds in work:
        heapq.heapreplace(busy, busy[0] + seconds)
    return max(busy) * multiprocessors / sum(work)


@cache
def key_value_groups(
    batch: int, heads: int, length: int, window: int | None, head_dim: int, multiprocessors: int
) -> int:
    """Return the number of copies of the key/value head, a divisor of `heads`.

    It is the least one with which the backward is balanced to `BALANCED`; if there is none, the best balanced.
    """

    def imbalance(groups: int) -> float:
        return backward_imbalance(batch, heads, groups, length, window, head_dim, multiprocessors)

    divisors = [groups for groups in range(1, heads + 1) if heads % groups == 0]
    return next((groups for groups in divisors if imbalance(groups) <= BALANCED), min(divisors, key=imbalance))


def repeated(x: Tensor, groups: int) -> Tensor:
    """Return keys or values x [T, B, hd] as `groups` identical heads, a view [B, groups, T, hd]."""
    return x.transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)

"""FlexAttention's shapes and costs on meta tensors, on which it does not run: for counts of a step, without values."""

# No postponed annotations: the operators' schemas are read from them.

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.triton_launch import multiprocessors

BLOCK = 128  # queries and keys of a block of scores
GLOBAL = -1  # the window of attention to all earlier tokens


@dataclass(frozen=True)
class CountedMask:
    """A mask of which only documents' shape [B, T] and the window are known."""

    shape: tuple[int, int]
    window: int


def counted_mask(documents: Tensor, window: int | None) -> CountedMask:
    """As `flex_mask`. Documents are counted as long as the sequence: more of them empty blocks of scores."""
    batch, length = documents.shape
    return CountedMask((batch, length), GLOBAL if window is None else window)


def counted_attention(q: Tensor, k: Tensor, v: Tensor, mask: CountedMask) -> Tensor:
    """Attention of q [T, B, H, hd] over k, v [T, B, hd]; returns [T, B, H * hd]. Meta tensors only."""
    keys, values = (tensor.transpose(0, 1).unsqueeze(1) for tensor in (k, v))
    attended, _ = forward(q.permute(1, 2, 0, 3), keys, values, mask.window)
    return attended.permute(2, 0, 1, 3).flatten(2)


@torch.library.custom_op("griffin::counted_attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """[B, H, T, hd] of q [B, H, T, hd] and k, v [B, 1, T, hd]; and the scores' log-sum-exp, float32 [B, H, T]."""
    raise NotImplementedError("counted_attention: meta tensors only")


@forward.register_fake
def _(q, k, v, window):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("griffin::counted_attention_backward", mutates_args=())
def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, log_sum_exp: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    raise NotImplementedError("counted_attention: meta tensors only")


@backward.register_fake
def _(grad, q, k, v, attended, log_sum_exp, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def visited_blocks(length: int, window: int) -> list[int]:
    """Blocks of keys that each block of queries visits, in a sequence of one document."""
    count = math.ceil(length / BLOCK)
    reach = count if window == GLOBAL else math.ceil((window - 1) / BLOCK)
    return [min(block, reach) + 1 for block in range(count)]


def _products(q: Tensor, window: int, products: int) -> float:
    """FLOPs of so many products of queries and keys over all visited scores."""
    batch, heads, length, head_dim = q.shape
    return 2.0 * products * batch * heads * head_dim * sum(visited_blocks(length, window)) * BLOCK**2


def _backward_balance(q: Tensor, window: int) -> float:
    """Mean over longest time of multiprocessors: a block of keys is one program, which walks all query heads.

    Programs are taken to start in the order of their number, on whichever multiprocessor is free.
    """
    batch, heads, length, _ = q.shape
    blocks = visited_blocks(length, window)
    # A program of keys computes 4 products of each block of scores, one of queries 3.
    work = [4 * heads * seen for seen in reversed(blocks) for _ in range(batch)]
    work += [3 * seen for seen in blocks for _ in range(batch * heads)]
    busy = [0.0] * multiprocessors(q.device)
    for seconds in work:
        heapq.heappush(busy, heapq.heappop(busy) + seconds)
    return sum(work) / len(busy) / max(busy)


@states_cost(forward)
def _(given, results) -> OperatorCost:
    q, window = given[0], given[3]
    return OperatorCost(
        kind="attention", flops=_products(q, window, 2), bytes=touched(given) + touched(results), kernels=1
    )


@states_cost(backward)
def _(given, results) -> OperatorCost:
    """Scores and the gradient of the weights are computed by programs of keys and of queries: 7 products, not 5."""
    grad, q, window = given[0], given[1], given[6]
    return OperatorCost(
        kind="attention backward",
        flops=_products(q, window, 7),
        bytes=touched(given) + touched(results) + 2 * touched([grad]),  # first, sums of attended times gradient
        kernels=2,
        balance=_backward_balance(q, window),
    )


register_flop_formula(torch.ops.griffin.counted_attention, get_raw=True)(
    lambda q, k, v, window, **_: int(_products(q, window, 2))
)
register_flop_formula(torch.ops.griffin.counted_attention_backward, get_raw=True)(
    lambda grad, q, k, v, attended, log_sum_exp, window, **_: int(_products(q, window, 7))
)


def _save(ctx, inputs, output):
    q, k, v, window = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.window = window
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return (*backward(grad, *ctx.saved_tensors, ctx.window), None)


forward.register_autograd(_backward, setup_context=_save)

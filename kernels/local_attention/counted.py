"""FlexAttention's shapes and costs on meta tensors, on which it does not run: for counts of a step, without values."""

# No postponed annotations: the operators' schemas are read from them.

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.local_attention.groups import (
    BLOCK,
    KEY_PRODUCTS,
    QUERY_PRODUCTS,
    backward_imbalance,
    key_value_groups,
    repeated,
    visited_blocks,
)
from griffin.kernels.triton_launch import multiprocessors

GLOBAL = -1  # the window of attention to all earlier tokens
BACKWARD_PRODUCTS = KEY_PRODUCTS + QUERY_PRODUCTS


@dataclass(frozen=True)
class CountedMask:
    """A mask of which only documents' shape [B, T] and the window are known."""

    shape: tuple[int, int]
    window: int


def counted_mask(documents: Tensor, window: int | None) -> CountedMask:
    """Return a mask like `flex_mask`, for one document per sequence: more documents would empty blocks of scores."""
    batch, length = documents.shape
    return CountedMask((batch, length), GLOBAL if window is None else window)


def counted_attention(q: Tensor, k: Tensor, v: Tensor, mask: CountedMask) -> Tensor:
    """Attention of q [T, B, H, hd] over k, v [T, B, hd]; returns [T, B, H * hd]. Meta tensors only."""
    length, batch, heads, head_dim = q.shape
    groups = key_value_groups(batch, heads, length, _window(mask.window), head_dim, multiprocessors(q.device))
    attended, _ = forward(q.permute(1, 2, 0, 3), repeated(k, groups), repeated(v, groups), mask.window)
    return attended.permute(2, 0, 1, 3).flatten(2)


@torch.library.custom_op("griffin::counted_attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """[B, H, T, hd] of q [B, H, T, hd] and k, v [B, G, T, hd]; and the scores' log-sum-exp, float32 [B, H, T]."""
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
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _window(window: int) -> int | None:
    return None if window == GLOBAL else window


def _products(q: Tensor, window: int, products: int) -> float:
    """FLOPs of so many products of queries and keys over all visited scores."""
    batch, heads, length, head_dim = q.shape
    return 2.0 * products * batch * heads * head_dim * sum(visited_blocks(length, _window(window))) * BLOCK**2


@states_cost(forward)
def _(given, results) -> OperatorCost:
    q, window = given[0], given[3]
    return OperatorCost(
        kind="attention", flops=_products(q, window, 2), bytes=touched(given) + touched(results), kernels=1
    )


@states_cost(backward)
def _(given, results) -> OperatorCost:
    """Scores and the gradient of the weights are computed by programs of keys and of queries: 7 products, not 5."""
    grad, q, k, window = given[0], given[1], given[2], given[6]
    batch, heads, length, head_dim = q.shape
    imbalance = backward_imbalance(
        batch, heads, k.shape[1], length, _window(window), head_dim, multiprocessors(q.device)
    )
    return OperatorCost(
        kind="attention backward",
        flops=_products(q, window, BACKWARD_PRODUCTS),
        bytes=touched(given) + touched(results) + 2 * touched([grad]),  # first, sums of attended times gradient
        kernels=2,
        balance=1 / imbalance,
    )


register_flop_formula(torch.ops.griffin.counted_attention, get_raw=True)(
    lambda q, k, v, window, **_: int(_products(q, window, 2))
)
register_flop_formula(torch.ops.griffin.counted_attention_backward, get_raw=True)(
    lambda grad, q, k, v, attended, log_sum_exp, window, **_: int(_products(q, window, BACKWARD_PRODUCTS))
)


def _save(ctx, inputs, output):
    q, k, v, window = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.window = window
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return (*backward(grad, *ctx.saved_tensors, ctx.window), None)


forward.register_autograd(_backward, setup_context=_save)

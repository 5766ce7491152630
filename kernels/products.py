"""Products of matrices that are added to a more precise total, as those of weights' gradients are."""

# No postponed annotations: the operators' schemas are read from them.

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from griffin.kernels.costs import OperatorCost, states_cost, touched


@torch.library.custom_op("griffin::add_product", mutates_args=("total",))
def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [M, K] += a^T b, for a [N, M] and b [N, K] of one dtype, which is the total's or a half-precision one."""
    if total.dtype == a.dtype:
        torch.addmm(total, a.t(), b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.t().to(total.dtype), b.to(total.dtype), out=total)


@add_product.register_fake
def _(total, a, b):
    return None


@register_flop_formula(torch.ops.griffin.add_product)
def _(total_shape: Any, a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@states_cost(add_product)
def _(given: Any, results: Any) -> OperatorCost:
    total, a, b = given
    flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    return OperatorCost(kind="products", bytes=touched((total, total, a, b)), kernels=1, flops=flops)

"""Matrix products that are added to a sum of higher precision, as gradients of weights are."""

# No `from __future__ import annotations`: operator schemas are inferred from the annotations.

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from griffin.kernels.costs import OperatorCost, Product, states_cost, touched


@torch.library.custom_op("griffin::add_product", mutates_args=("total",))
def add_product(total: Tensor, a: Tensor, b: Tensor, overwrite: bool = False) -> None:
    """total [M, K] += a^T b, for a [N, M] and b [N, K] of one dtype, which is the total's or a half-precision one.

    With `overwrite` the total becomes the product, and what it held is not read.
    """
    if overwrite:
        if total.dtype == a.dtype:
            torch.mm(a.t(), b, out=total)
        elif a.is_cuda:
            torch.mm(a.t(), b, out_dtype=total.dtype, out=total)
        else:
            torch.mm(a.t().to(total.dtype), b.to(total.dtype), out=total)
    elif total.dtype == a.dtype:
        torch.addmm(total, a.t(), b, out=total)
    elif a.is_cuda and a.is_contiguous() and total.dtype == torch.float32 and (fused := _apex_product()) is not None:
        fused(b.contiguous(), a, total)
    elif a.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.t().to(total.dtype), b.to(total.dtype), out=total)


@cache
def _apex_product() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """Return Apex's product that adds to a float32 sum, or None if its extension is not built."""
    try:
        return importlib.import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32
    except (ImportError, AttributeError):
        return None


@add_product.register_fake
def _(total, a, b, overwrite=False):
    return None


@register_flop_formula(torch.ops.griffin.add_product)
def _(total_shape: Any, a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@states_cost(add_product)
def _(given: Any, results: Any) -> OperatorCost:
    total, a, b, *overwrite = given
    product = Product(m=a.shape[1], n=b.shape[1], k=a.shape[0])
    return OperatorCost(
        kind="products",
        bytes=touched((total, a, b) if any(overwrite) else (total, total, a, b)),
        kernels=1,
        flops=product.flops,
        product=product,
    )

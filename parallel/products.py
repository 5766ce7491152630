"""Matrix products with weights that are sharded over tensor ranks: their communication, and their weights' gradients.

A column-parallel product's input is whole on every rank and its output sharded; a row-parallel product's input is
sharded and its output summed over ranks. With sequence parallelism what is whole is sharded over time instead: gathered
before, or reduce-scattered after, the product (Korthikanti et al., arXiv 2205.05198).

Gradients of weights in megatron-core's buffers are added to `main_grad`, in float32, by the product itself. Elsewhere
autograd gets them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory


def column_product(
    x: Tensor, weights: Sequence[Tensor], group: dist.ProcessGroup, *, sequence_parallel: bool, overlap: bool = False
) -> Tensor:
    """x [T, B, D] times each weight [N, D], side by side: [T, B, sum of N], of this rank's rows.

    With sequence parallelism x is this rank's part of T. With `overlap`, it is gathered behind the product.
    Backward, the gradient of x is reduced behind the products for the weights' gradients.
    """
    return _ColumnProduct.apply(x, group, sequence_parallel and group.size() > 1, overlap, *weights)


def row_product(
    x: Tensor, weight: Tensor, group: dist.ProcessGroup, *, sequence_parallel: bool, overlap: bool = False
) -> Tensor:
    """x [T, B, N] times weight [D, N], summed over tensor ranks: [T, B, D], of which x and weight have this rank's N.

    With sequence parallelism the result is this rank's part of T. With `overlap`, it is reduced behind the product, and
    backward its gradient is gathered behind the product for the gradient of x.
    """
    return _RowProduct.apply(x, weight, group, sequence_parallel and group.size() > 1, overlap)


class _ColumnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, sequence_parallel, overlap, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.group, ctx.sequence_parallel, ctx.overlap = group, sequence_parallel, overlap
        weight = _joined(weights)
        if sequence_parallel and overlap:
            return _gathered_product(x, weight.t(), group)[1]
        if sequence_parallel:
            x = _gather(x, group)[0]
        return _product(x, weight.t())

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        group, needs_weights = ctx.group, any(ctx.needs_input_grad[4:])
        pending: list[dist.Work] = []
        whole = x
        if ctx.sequence_parallel and needs_weights:  # gathered again, rather than kept
            whole, work = _gather(x, group, async_op=True)
            pending.append(work)
        weight = _joined(weights)
        if ctx.sequence_parallel and ctx.overlap:
            grad_x = _product_scattered(grad, weight, group)
            _wait(pending)
        else:
            grad_x = _product(grad, weight)
            _wait(pending)
            if ctx.sequence_parallel:
                grad_x, work = _reduce_scatter(grad_x, group, async_op=True)
                pending = [work]
            elif group.size() > 1:
                pending = [dist.all_reduce(grad_x, group=group, async_op=True)]
        grads: list[Tensor | None] = []
        rows = 0
        for place, part in enumerate(weights):
            part_grad = grad.narrow(-1, rows, len(part))
            grads.append(add_weight_gradient(part, part_grad, whole) if ctx.needs_input_grad[4 + place] else None)
            rows += len(part)
        if not (ctx.sequence_parallel and ctx.overlap):
            _wait(pending)
        return grad_x, None, None, None, *grads


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, group, sequence_parallel, overlap):
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel, ctx.overlap = group, sequence_parallel, overlap
        if sequence_parallel and overlap:
            return _product_scattered(x, weight.t(), group)
        y = _product(x, weight.t())
        if sequence_parallel:
            return _reduce_scatter(y, group)[0]
        if group.size() > 1:
            dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if ctx.sequence_parallel and ctx.overlap:
            grad, grad_x = _gathered_product(grad, weight, ctx.group)
        else:
            if ctx.sequence_parallel:
                grad = _gather(grad, ctx.group)[0]
            grad_x = _product(grad, weight)
        grad_weight = add_weight_gradient(weight, grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None


def add_weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Add the gradient of a weight [N, D], from grad [T, B, N] and x [T, B, D], to its `main_grad`.

    Returns what autograd is to be given: without a `main_grad` the gradient itself, else a tensor of any values, on
    which megatron-core's hook marks the gradient as ready and which it does not add.
    """
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad.t() @ x
    _add_product(main_grad, grad, x)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def _add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total [N, D], float32, += grad [M, N]^T x [M, D]."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), x)
    elif grad.device.type == "cpu":  # which has no product of bfloat16 with a float32 result
        total.add_(grad.t() @ x)
    elif (fused := _apex_product()) is not None and grad.is_contiguous():
        fused(x.contiguous(), grad, total)
    else:
        torch.addmm(total, grad.t(), x, out_dtype=total.dtype, out=total)


@cache
def _apex_product() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """Apex's product that adds to a float32 sum, where its extension is built."""
    try:
        return importlib.import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32
    except (ImportError, AttributeError):
        return None


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(tuple(weights))


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """[T, B, N] of x [T, B, K] and matrix [K, N]."""
    return torch.mm(x.flatten(0, -2), matrix).unflatten(0, x.shape[:-1])


def _wait(pending: list[dist.Work]) -> None:
    for work in pending:
        work.wait()


def _gather(x: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    whole = x.new_empty((len(x) * group.size(), *x.shape[1:]))
    return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=async_op)


def _reduce_scatter(y: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    part = y.new_empty((len(y) // group.size(), *y.shape[1:]))
    return part, dist.reduce_scatter_tensor(part, y.contiguous(), group=group, async_op=async_op)


# Products whose communication runs behind them, in pieces: PyTorch's over symmetric memory, on GPUs that reach each
# other's memory. On other devices PyTorch's own definitions of these operators, which communicate first or last.


def _gathered_product(x: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """x gathered over T, and its product [T, B, N] with matrix [K, N]."""
    gather: Callable[..., Any] = torch.ops.symm_mem.fused_all_gather_matmul
    if x.device.type == "cpu":
        gather = symmetric_memory._fused_all_gather_matmul_fallback
    whole, (product,) = gather(x.contiguous(), [matrix], 0, group.group_name)
    return whole, product


def _product_scattered(x: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of x [T, B, K] times matrix [K, N], this rank's part of T."""
    scatter: Callable[..., Any] = torch.ops.symm_mem.fused_matmul_reduce_scatter
    if x.device.type == "cpu":
        scatter = symmetric_memory._fused_matmul_reduce_scatter_fallback
    return scatter(x.contiguous(), matrix, "sum", 0, group.group_name)

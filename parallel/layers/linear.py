"""Tensor-parallel linear layers: their products, communication, weight gradients, and single-token counterparts.

The input of a column-parallel linear is replicated over tensor ranks and its output sharded; the input of a
row-parallel linear is sharded and its output all-reduced. With sequence parallelism, what is replicated is sharded over
time instead: all-gathered before the product, or reduce-scattered after it (Korthikanti et al., arXiv 2205.05198).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _symmetric_memory as symmetric_memory

from griffin.kernels.products import add_product
from griffin.parallel.config import ParallelConfig
from griffin.parallel.context import Context
from griffin.parallel.layers.recompute import saving
from griffin.parallel.sharding import Piece, describe, normal, zeros
from griffin.parallel.world.grid import Grid

# A layer for one token of B sequences, channels first: [inputs, B] -> [outputs, B], so that matrix products with few
# sequences read the weights in their memory order.
LayerStep = Callable[[Tensor], Tensor]


class Branch(NamedTuple):
    """Output `value + bias` of a residual branch, whose sum is left to the norm that adds the branch to its input."""

    value: Tensor  # [T, B, D], or this rank's part of T with sequence parallelism
    bias: Tensor | None  # [D]


class ColumnLinear(nn.Module):
    """Column-parallel linears [outputs, D] of the same input, fused: x [T, B, D] -> [T, B, linears x outputs / t].

    A rank's weight holds its rows of the first, then its rows of the second, and so on. With sequence parallelism x is
    this rank's part of T. Biases are initialised to zero.
    """

    def __init__(self, context: Context, names: Sequence[str], outputs: int, *, atoms: int, std: float):
        super().__init__()
        width, local = context.model.width, outputs // context.grid.tensor_size
        self.context = context
        self.weight = context.parameter(len(names) * local, width)
        self.bias = context.parameter(len(names) * local)
        for suffix, parameter, shape, init in (
            ("weight", self.weight, (outputs, width), normal(std)),
            ("bias", self.bias, (outputs,), zeros),
        ):
            describe(
                parameter,
                *(
                    Piece(name=f"{name}.{suffix}", shape=shape, init=init, axis=0, atoms=atoms, start=place * local)
                    for place, name in enumerate(names)
                ),
                weight_decay=suffix == "weight",
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) + self.bias

    def product(self, x: Tensor) -> Tensor:
        """Compute the output without the bias."""
        return column_product(x, (self.weight,), self.context)

    def stepper(self) -> LayerStep:
        """Return the single-token linear, which computes this rank's shard of the output."""
        weight, bias = self.weight, self.bias[:, None]
        return lambda x: torch.addmm(bias, weight, x)


class RowLinear(nn.Module):
    """Row-parallel output linear [D, inputs] of a branch: x [T, B, inputs / t] -> [T, B, D], or this rank's part of T.

    The bias is returned and not added.
    """

    def __init__(self, context: Context, name: str, inputs: int, *, atoms: int):
        super().__init__()
        width = context.model.width
        self.context = context
        self.weight = context.parameter(width, inputs // context.grid.tensor_size)
        self.bias = context.parameter(width)
        std = math.sqrt(2 / context.model.blocks / inputs)
        describe(
            self.weight,
            Piece(name=f"{name}.weight", shape=(width, inputs), init=normal(std), axis=1, atoms=atoms, dim=1),
            weight_decay=True,
        )
        describe(
            self.bias,
            Piece(name=f"{name}.bias", shape=(width,), init=zeros),
            weight_decay=False,
            sequence_parallel=True,
        )

    def forward(self, x: Tensor) -> Branch:
        return Branch(row_product(x, self.weight, self.context), self.bias)

    def stepper(self) -> LayerStep:
        """Return the single-token linear, whose output is all-reduced over tensor ranks."""
        weight, bias, group = self.weight, self.bias[:, None], self.context.grid.tensor_group
        if group.size() == 1:
            return lambda x: torch.addmm(bias, weight, x)

        def step(x: Tensor) -> Tensor:
            y = torch.mm(weight, x)
            dist.all_reduce(y, group=group)
            return y.add_(bias)

        return step


def column_product(x: Tensor, weights: Sequence[Tensor], context: Context) -> Tensor:
    """Return x [T, B, D] times each weight [N, D], side by side: [T, B, sum of N], of this rank's rows.

    With sequence parallelism x is this rank's part of T; `overlap_tensor` all-gathers it behind the product. In the
    backward pass the gradient of x is reduced behind the products for the gradients of the weights.
    """
    with saving(x):
        return _ColumnProduct.apply(x, *_communication(context), context.keep_gathered, *weights)


def row_product(x: Tensor, weight: Tensor, context: Context) -> Tensor:
    """Return the sum over tensor ranks of x [T, B, N] times weight [D, N]: [T, B, D].

    With sequence parallelism it is this rank's part of T, and with `overlap_tensor` it is reduce-scattered behind the
    product; in the backward pass its gradient is all-gathered behind the product for the gradient of x.
    """
    with saving(x):
        return _RowProduct.apply(x, weight, *_communication(context))


def _communication(context: Context) -> tuple[dist.ProcessGroup, bool, bool]:
    """The tensor-parallel group; whether activations between blocks are sharded, and their communication overlapped."""
    group = context.grid.tensor_group
    sequence_parallel = context.megatron.sequence_parallel and group.size() > 1
    return group, sequence_parallel, sequence_parallel and context.overlap_tensor


class _ColumnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, sequence_parallel, overlap, keep_gathered, *weights):
        ctx.weights = weights  # hooks on saved tensors, as of recomputation, would lose their `main_grad`
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        ctx.gather_again = sequence_parallel and not keep_gathered
        weight = _joined(weights)
        if overlap:
            whole, y = _gathered_product(x, weight.t(), group)
        else:
            whole = _gather(x, group)[0] if sequence_parallel else x
            y = _product(whole, weight.t())
        ctx.save_for_backward(x if ctx.gather_again else whole)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x,), weights = ctx.saved_tensors, ctx.weights
        group, needs_weights = ctx.group, any(ctx.needs_input_grad[5:])
        pending: list[dist.Work] = []
        whole = x
        if ctx.gather_again and needs_weights:
            whole, work = _gather(x, group, async_op=True)
            pending.append(work)
        grad_x = _product(grad, _joined(weights))
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
            grads.append(add_weight_gradient(part, part_grad, whole) if ctx.needs_input_grad[5 + place] else None)
            rows += len(part)
        _wait(pending)
        return grad_x, None, None, None, None, *grads


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, group, sequence_parallel, overlap):
        ctx.save_for_backward(x)
        ctx.weight = weight
        ctx.group, ctx.sequence_parallel, ctx.overlap = group, sequence_parallel, overlap
        if overlap:
            return _product_scattered(x, weight.t(), group)
        y = _product(x, weight.t())
        if sequence_parallel:
            return _reduce_scatter(y, group)[0]
        if group.size() > 1:
            dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x,), weight = ctx.saved_tensors, ctx.weight
        if ctx.overlap:
            grad, grad_x = _gathered_product(grad, weight, ctx.group)
        else:
            if ctx.sequence_parallel:
                grad = _gather(grad, ctx.group)[0]
            grad_x = _product(grad, weight)
        grad_weight = add_weight_gradient(weight, grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None


def add_weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Add the gradient of a weight [N, D], from grad [T, B, N] and x [T, B, D], to its `main_grad`.

    Returns what autograd is to be given: without a `main_grad` the gradient itself, else `gradient_was_added`.
    """
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad.t() @ x
    add_product(main_grad, grad, x)
    return gradient_was_added(weight)


def gradient_was_added(parameter: Tensor) -> Tensor:
    """Return what autograd is to be given for a parameter whose gradient has been added to its `main_grad`.

    It is a tensor of any values. megatron-core's hook does not add it, and marks the gradient as ready.
    """
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(parameter)


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


# Products whose communication runs behind them, in pieces: PyTorch's over symmetric memory, for GPUs that can access
# each other's memory. On CPUs, PyTorch's definitions of these operators, which communicate before or after the product.


def overlaps_tensor(layout: ParallelConfig, grid: Grid) -> bool:
    """Return whether tensor-parallel communication runs behind products (`parallel.overlap_tensor`). A collective."""
    if layout.overlap_tensor == "off" or not layout.sequence_parallel or layout.tensor == 1:
        return False
    if layout.overlap_tensor == "on" or grid.device.type == "meta":  # which stands for GPUs of one node
        return True
    return grid.device.type == "cuda" and _is_overlap_correct(grid)


def _is_overlap_correct(grid: Grid) -> bool:
    """Compare both products with plain ones on small integers, which have exact sums, on every tensor rank."""
    group, size = grid.tensor_group, grid.tensor_size
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": grid.device}
    x = torch.arange(128 * 128, **options).view(128, 1, 128).remainder(3).add(grid.tensor_rank)
    matrix = torch.eye(128, **options)
    try:
        whole, product = _gathered_product(x, matrix, group)
        reduced = _product_scattered(whole, matrix, group)
        expected = _gather(x, group)[0]
        is_correct = torch.equal(product, expected) and torch.equal(reduced, x * size)
    except RuntimeError:  # no peer access, or no multicast
        is_correct = False
    agreed = torch.tensor(int(is_correct), device=grid.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    return bool(agreed)


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

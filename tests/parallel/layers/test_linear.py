"""Products over tensor ranks: values and gradients of every form against one float64 product."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from griffin.parallel.config import ATTENTION, ModelConfig, ParallelConfig
from griffin.parallel.context import Context, megatron_config
from griffin.parallel.layers.linear import add_weight_gradient, column_product, row_product
from griffin.parallel.world.grid import rank_grid
from griffin.parallel.world.ranks import Ranks
from tests.ranks import RankPool

MODEL = ModelConfig(pattern=(ATTENTION,), width=12, recurrent_width=12, heads=4, head_dim=4, vocabulary=8)
T, B, D, N = 8, 3, 12, (8, 4)  # time, sequences, model width, rows of two weights over all ranks


def inputs(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _errors(pairs: dict[str, tuple[Tensor | None, Tensor]]) -> dict[str, float]:
    found = {}
    for name, (got, wanted) in pairs.items():
        assert got is not None, f"{name} has no gradient"
        found[name] = (got - wanted).abs().max().item()
    return found


def _part(tensor: Tensor, dim: int) -> Tensor:
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def errors(
    ranks: Ranks, product: str, sequence_parallel: bool, overlap: bool, keep_gathered: bool, in_buffers: bool
) -> dict[str, float]:
    """The largest error of this rank's parts of the output and of every gradient."""
    layout = ParallelConfig(tensor=ranks.world_size, sequence_parallel=sequence_parallel)
    with rank_grid(layout, ranks) as grid:
        context = Context(
            model=MODEL,
            grid=grid,
            megatron=megatron_config(MODEL, layout, torch.float64, grid.device),
            device=grid.device,
            overlap_tensor=overlap,
            keep_gathered=keep_gathered,
        )
        return {"column": _column, "row": _row}[product](context, in_buffers)


def _column(context: Context, in_buffers: bool) -> dict[str, float]:
    x, first, second, grad = inputs(0, (T, B, D), (N[0], D), (N[1], D), (T, B, sum(N)))
    y = torch.cat([torch.einsum("tbd,nd->tbn", x, weight) for weight in (first, second)], -1)
    grads = grad.split(N, -1)
    parts = [_part(weight, 0).requires_grad_() for weight in (first, second)]
    if in_buffers:
        for part in parts:
            part.main_grad = torch.ones_like(part)  # type: ignore[attr-defined]
    here = (_part(x, 0) if context.megatron.sequence_parallel else x.clone()).requires_grad_()
    result = column_product(here, parts, context)
    result.backward(torch.cat([_part(each, -1) for each in grads], -1))
    grad_x = sum(torch.einsum("tbn,nd->tbd", each, weight) for each, weight in zip(grads, (first, second), strict=True))
    assert isinstance(grad_x, Tensor)
    pairs: dict[str, tuple[Tensor | None, Tensor]] = {
        "y": (result.detach(), torch.cat([_part(each, -1) for each in y.split(N, -1)], -1)),
        "x": (here.grad, _part(grad_x, 0) if context.megatron.sequence_parallel else grad_x),
    }
    for name, part, each in zip(("first", "second"), parts, grads, strict=True):
        expected = _part(torch.einsum("tbn,tbd->nd", each, x), 0)
        if in_buffers:
            assert part.grad_added_to_main_grad  # type: ignore[attr-defined]
            pairs[name] = (part.main_grad - 1, expected)  # type: ignore[attr-defined]
        else:
            pairs[name] = (part.grad, expected)
    return _errors(pairs)


def _row(context: Context, in_buffers: bool) -> dict[str, float]:
    x, weight, grad = inputs(1, (T, B, N[0]), (D, N[0]), (T, B, D))
    y = torch.einsum("tbn,dn->tbd", x, weight)
    here, part = _part(x, -1).requires_grad_(), _part(weight, 1).requires_grad_()
    if in_buffers:
        part.main_grad = torch.ones_like(part)  # type: ignore[attr-defined]
    result = row_product(here, part, context)
    result.backward(_part(grad, 0) if context.megatron.sequence_parallel else grad)
    expected = _part(torch.einsum("tbd,tbn->dn", grad, x), 1)
    got = part.main_grad - 1 if in_buffers else part.grad  # type: ignore[attr-defined]
    pairs: dict[str, tuple[Tensor | None, Tensor]] = {
        "y": (result.detach(), _part(y, 0) if context.megatron.sequence_parallel else y),
        "x": (here.grad, _part(torch.einsum("tbd,dn->tbn", grad, weight), -1)),
        "weight": (got, expected),
    }
    return _errors(pairs)


@pytest.mark.parametrize("product", ["column", "row"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("sequence_parallel", "overlap", "keep_gathered"),
    [(False, False, False), (True, False, False), (True, False, True), (True, True, False), (True, True, True)],
)
@pytest.mark.parametrize("in_buffers", [False, True])
def test_equals_one_product(
    rank_pool: RankPool,
    product: str,
    ranks: int,
    sequence_parallel: bool,
    overlap: bool,
    keep_gathered: bool,
    in_buffers: bool,
) -> None:
    """Sums of a few dozen float64 products: 1e-13."""
    for found in rank_pool.run(errors, ranks, product, sequence_parallel, overlap, keep_gathered, in_buffers):
        assert all(error < 1e-13 for error in found.values()), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_add_up_in_float32(dtype: torch.dtype) -> None:
    """A thousand additions of a small gradient to a large sum, which bfloat16 would lose."""
    weight = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    weight.main_grad = torch.full((2, 3), 256.0)  # type: ignore[attr-defined]
    grad, x = torch.full((1, 1, 2), 0.0078125, dtype=dtype), torch.ones(1, 1, 3, dtype=dtype)
    for _ in range(1024):
        add_weight_gradient(weight, grad, x)
    assert torch.equal(weight.main_grad, torch.full((2, 3), 264.0))  # type: ignore[attr-defined]

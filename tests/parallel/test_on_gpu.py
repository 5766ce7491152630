"""Layers on GPUs: the embedding's gradient, and products whose communication runs behind them, on two GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from griffin.parallel.config import ATTENTION, ModelConfig, ParallelConfig
from griffin.parallel.context import Context, megatron_config
from griffin.parallel.layers.embedding import Embedding
from griffin.parallel.layers.linear import column_product, overlaps_tensor, row_product
from griffin.parallel.world.grid import Grid, rank_grid, single_rank_grid
from griffin.parallel.world.ranks import Ranks
from tests.ranks import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODEL = ModelConfig(
    pattern=(ATTENTION,), width=512, recurrent_width=512, heads=4, head_dim=128, gate_blocks=4, vocabulary=1000
)
T, B, N = 1024, 2, 1024


def context(layout: ParallelConfig, grid: Grid, overlap_tensor: bool = False) -> Context:
    megatron = megatron_config(MODEL, layout, torch.bfloat16, grid.device)
    return Context(model=MODEL, grid=grid, megatron=megatron, device=grid.device, overlap_tensor=overlap_tensor)


def random(*shape: int, seed: int) -> Tensor:
    """On the CPU, so that it is the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_gradient_of_the_embedding() -> None:
    """Half of the tokens are the same: their gradients are summed in float32, in the same order in both runs."""
    tokens = torch.randint(MODEL.vocabulary, (B, T), generator=torch.Generator().manual_seed(1))
    tokens[:, ::2] = 7
    grad = random(B, T, MODEL.width, seed=2)
    expected = torch.ones(MODEL.padded_vocabulary, MODEL.width, dtype=torch.float64)
    expected.index_put_((tokens,), grad.double(), accumulate=True)
    found = []
    with single_rank_grid() as grid:
        for _ in range(2):
            embedding = Embedding(context(ParallelConfig(), grid))
            with torch.no_grad():
                embedding.weight.copy_(random(*embedding.weight.shape, seed=3))
            total = torch.ones(embedding.weight.shape, device=grid.device)
            embedding.weight.main_grad = total
            x = embedding(tokens.to(grid.device))
            assert torch.equal(x, embedding.weight[tokens.to(grid.device)])
            x.backward(grad.to(grid.device))
            found.append(total.cpu())
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-4)


def products(ranks: Ranks, overlap: bool) -> dict[str, Tensor] | None:
    """This rank's results and gradients of both products, or None where GPUs cannot access each other's memory."""
    layout = ParallelConfig(tensor=ranks.world_size, sequence_parallel=True)
    with rank_grid(layout, ranks) as grid:
        if overlap and not overlaps_tensor(layout, grid):
            return None
        given = context(layout, grid, overlap)

        def part(tensor: Tensor, dim: int) -> Tensor:
            mine = tensor.chunk(grid.tensor_size, dim)[grid.tensor_rank]
            return mine.to(grid.device).contiguous().requires_grad_()

        column = part(random(T, B, MODEL.width, seed=1), 0), part(random(N, MODEL.width, seed=2), 0)
        row = part(random(T, B, N, seed=3), 2), part(random(MODEL.width, N, seed=4), 1)
        results = column_product(column[0], (column[1],), given), row_product(*row, given)
        grads = part(random(T, B, N, seed=5), 2), part(random(T, B, MODEL.width, seed=6), 0)
        found = torch.autograd.grad(results, (*column, *row), grads)
        names = ("column", "row", "column's x", "column's weight", "row's x", "row's weight")
        return {name: value.detach().float().cpu() for name, value in zip(names, (*results, *found), strict=True)}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_products_over_symmetric_memory(rank_pool: RankPool) -> None:
    plain, overlapped = (rank_pool.run(products, 2, overlap) for overlap in (False, True))
    for expected, found in zip(plain, overlapped, strict=True):
        if found is None:
            pytest.skip("the GPUs cannot access each other's memory")
        for name, value in found.items():
            error = ((value - expected[name]).abs().max() / expected[name].abs().max()).item()
            assert error <= 2**-7, f"{name}: {error:.1e}"  # sums of bfloat16 in another order

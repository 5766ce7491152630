"""The embedding over tensor ranks against rows of the whole table, and the table's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from griffin.parallel.config import ParallelConfig
from griffin.parallel.context import Context, megatron_config
from griffin.parallel.layers.embedding import Embedding
from griffin.parallel.world.grid import rank_grid
from tests.layouts import make_config
from tests.ranks import RankPool

B, T = 3, 8


def inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Table, tokens [B, T], some of which occur several times, and the gradient of the output, [T, B, D]."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    tokens = torch.randint(rows, (B, T), generator=generator)
    tokens[:, 2:5] = tokens[0, 0]
    return table, tokens, torch.randn(T, B, width, generator=generator, dtype=torch.float64)


def embedding_of_a_rank(ranks: Any, layout: ParallelConfig, main_grad: bool) -> dict[str, Tensor]:
    """With the gradient of this rank's rows."""
    model = make_config("hawk", layout).model
    table, tokens, grad = inputs(model.padded_vocabulary, model.width)
    with rank_grid(layout, ranks) as grid:
        context = Context(
            model=model,
            grid=grid,
            megatron=megatron_config(model, layout, torch.float64, grid.device),
            device=grid.device,
        )
        embedding = Embedding(context)
        weight = embedding.weight
        with torch.no_grad():
            weight.copy_(table.chunk(layout.tensor)[grid.tensor_rank])
        if main_grad:
            weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
        x = embedding(tokens)
        if layout.sequence_parallel:
            grad = grad.chunk(layout.tensor)[grid.tensor_rank]
        else:
            x = x.transpose(0, 1)
        x.backward(grad)
        assert getattr(weight, "grad_added_to_main_grad", False) == main_grad
        return {"x": x.detach().clone(), "table": weight.main_grad - 1 if main_grad else weight.grad}


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "main_grad"),
    [(1, False, False), (1, False, True), (2, False, True), (2, True, False), (4, True, True)],
)
def test_equals_rows_of_the_table(rank_pool: RankPool, tensor: int, sequence_parallel: bool, main_grad: bool) -> None:
    layout = ParallelConfig(tensor=tensor, sequence_parallel=sequence_parallel)
    model = make_config("hawk", layout).model
    table, tokens, grad = inputs(model.padded_vocabulary, model.width)
    expected = torch.zeros_like(table).index_put_((tokens.t(),), grad, accumulate=True)
    answers = rank_pool.run(embedding_of_a_rank, tensor, layout, main_grad)
    for x in [torch.cat([answer["x"] for answer in answers])] if sequence_parallel else [a["x"] for a in answers]:
        assert torch.equal(x, table[tokens.t()])
    gradient = torch.cat([answer["table"] for answer in answers])
    # `main_grad` is float32; a row is the sum of up to nine gradients.
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5 if main_grad else 1e-12)
    untouched = torch.ones(len(table), dtype=torch.bool)
    untouched[tokens] = False
    assert not gradient[untouched].any()

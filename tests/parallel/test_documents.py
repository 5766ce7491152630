"""Packed documents give the logits and gradients of separate documents, through the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from griffin.parallel import sharding
from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.stage import Stage, build_stages
from griffin.parallel.world.grid import Grid, single_rank_grid

# Two sequences of packed documents: shorter than the convolution, longer than the window, and at every edge.
ROWS = ((1, 2, 3, 17, 4, 1, 9), (19, 1, 1, 8, 3, 5))
T = sum(ROWS[0])
GRIFFIN = ModelConfig(
    pattern=(RECURRENT, RECURRENT, ATTENTION, RECURRENT),
    width=32,
    recurrent_width=48,
    heads=4,
    head_dim=8,
    gate_blocks=4,
    window=5,
    vocabulary=200,
)
MODELS = {
    "griffin": GRIFFIN,
    "griffin-scaled-and-capped": replace(GRIFFIN, scale_embedding=True, logit_soft_cap=5.0),
    "hawk": replace(GRIFFIN, pattern=(RECURRENT,) * 3),
    "mqa": replace(GRIFFIN, pattern=(GLOBAL_ATTENTION,) * 3),
}


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    with single_rank_grid() as grid:
        yield grid


def make_stage(model: ModelConfig, grid: Grid) -> Stage:
    """Build the whole model with random weights, also of biases and norms, so that leaks are detected."""
    (stage,) = build_stages(model, ParallelConfig(), grid, dtype=torch.float32, sequence=T)
    sharding.initialize([stage], grid, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for piece, parameter in sharding.named_pieces([stage]):
            part = piece.view(parameter, 1)
            if not part.any():
                part.normal_(0, 0.3, generator=generator)
            elif piece.name.endswith("conv.weight"):
                part.mul_(10)  # initially the convolution hardly sees another token
    return stage


def run(stage: Stage, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits [T, B, V] and the loss of every token [T, B]; gradients of the loss are accumulated."""
    logits = stage({name: value for name, value in batch.items() if name != "labels"})
    total, losses = stage(batch)
    total.backward()
    return logits.detach()[..., : stage.model.vocabulary], losses


def gradients(stage: Stage, grid: Grid) -> dict[str, Tensor]:
    def grad(parameter: torch.nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    found = {name: value.clone() for name, value in sharding.gather([stage], grid, grad).items()}
    stage.zero_grad()
    return found


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = (len(ROWS), T)
    return {
        "tokens": torch.randint(GRIFFIN.vocabulary, size, generator=generator),
        "labels": torch.randint(GRIFFIN.vocabulary, size, generator=generator),
        "positions": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS]),
    }


# Between them, these have every mixer.
QUICK = {"griffin-scaled-and-capped", "mqa"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_packed_documents_equal_separate_documents(grid: Grid, name: str) -> None:
    stage, batch = make_stage(MODELS[name], grid), rows()
    logits, losses = run(stage, batch)
    packed = gradients(stage, grid)

    # The same sequences as one document each: what is compared below must depend on where documents start.
    with torch.no_grad():
        whole = stage({"tokens": batch["tokens"], "positions": torch.arange(T).expand(len(ROWS), T)})
    assert (whole[..., : GRIFFIN.vocabulary] - logits).abs().max() > 0.1

    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            apart_logits, apart_losses = run(stage, {key: value[row : row + 1, part] for key, value in batch.items()})
            # float32, the scan and the products in blocks of another size: 2e-6 was seen on logits of up to 4.
            torch.testing.assert_close(logits[part, row], apart_logits[:, 0], rtol=0, atol=2e-5)
            torch.testing.assert_close(losses[part, row], apart_losses[:, 0], rtol=0, atol=2e-5)
            start += length
        assert start == T
    for key, expected in gradients(stage, grid).items():
        scale = expected.abs().max().item()
        assert scale > 0, key
        # Sums over tokens in another order, relative to the largest element: 1e-6 was seen.
        assert (packed[key] - expected).abs().max().item() <= 1e-5 * scale, key

"""Training with each backend of convolution and recurrence: the same losses in every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from griffin.parallel.config import ATTENTION, RECURRENT, ParallelConfig
from griffin.parallel.world.grid import rank_grid
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training
from tests.kernels.interpreter import needs_interpreter
from tests.layouts import global_batch, make_config
from tests.ranks import RankPool

STEPS, BATCH, TOKENS = 3, 4, 20  # Triton's interpreter takes 20 ms a token and block, forward and backward
LAYOUTS = {
    "dp2": ParallelConfig(),
    "tp2-sequence-parallel": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2),
}
RANKS = {"dp2": 2, "tp2-sequence-parallel": 2, "pp2": 2, "tp2-pp2": 4}


def config(layout: ParallelConfig, kernels: str, recompute: str = "none") -> Config:
    made = make_config("griffin", layout, kernels=kernels, recompute=recompute, global_batch=BATCH, steps=STEPS)
    model = dataclasses.replace(made.model, pattern=(RECURRENT, ATTENTION, RECURRENT))
    return dataclasses.replace(made, model=model, data=dataclasses.replace(made.data, sequence_length=TOKENS))


def losses(ranks: Any, config: Config) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    results = []
    with rank_grid(config.parallel, ranks) as grid:
        training = Training(config, grid)
        for step in range(STEPS):
            samples, size = global_batch(step)[:BATCH], config.train.micro_batch
            micro_batches = [
                {key: torch.stack([s[key][:TOKENS] for s in samples[place : place + size]]) for key in samples[0]}
                for place in range(grid.data_rank * size, BATCH, grid.data_size * size)
            ]
            result = training.step(iter(micro_batches))
            results.append((result.loss, result.grad_norm))
    return results


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool) -> list[tuple[float, float]]:
    (found,) = rank_pool.run(losses, 1, config(ParallelConfig(), "reference"))
    assert len({loss for loss, _ in found}) == STEPS
    return found


@needs_interpreter
@pytest.mark.parametrize("layout", [pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_triton_trains_as_the_reference_does(
    rank_pool: RankPool, expected: list[tuple[float, float]], layout: str
) -> None:
    for found in rank_pool.run(losses, RANKS[layout], config(LAYOUTS[layout], "triton"), timeout=300):
        # float32 rounding (6e-8) of sums in another order over three Adam steps; 9e-8 was seen.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["states", "norms+gelu", "block"])
def test_recomputation_changes_no_bit(rank_pool: RankPool, recompute: str) -> None:
    answers = [
        rank_pool.run(losses, 1, config(ParallelConfig(), "triton", setting), timeout=300)
        for setting in ("none", recompute)
    ]
    assert answers[0] == answers[1]


def test_the_backend_for_cpus_trains_as_the_reference_does(
    rank_pool: RankPool, expected: list[tuple[float, float]]
) -> None:
    (found,) = rank_pool.run(losses, 1, config(ParallelConfig(), "cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)

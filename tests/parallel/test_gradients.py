"""Gradients at the end of a step, beside those that megatron-core's own finalize_model_grads gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed import finalize_model_grads

from griffin.parallel.gradients import sum_tensor_gradients
from griffin.parallel.world.grid import Grid, rank_grid
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training
from tests.layouts import LAYOUTS, make_config, micro_batches
from tests.ranks import RankPool


def compare(ranks: Any, config: Config) -> tuple[int, int]:
    """Compute the same gradients with our division and with megatron-core's. Returns (elements, those that differ)."""
    with rank_grid(config.parallel, ranks) as grid:
        training = Training(config, grid)
        ours = own_shards(training, config, grid)

        def finalize(model: Any, num_tokens: Any = None, **kwargs: Any) -> None:
            finalize_model_grads(model, num_tokens, **kwargs)
            sum_tensor_gradients(model, grid)

        training.stages[0].config.finalize_model_grads_func = finalize
        theirs = own_shards(training, config, grid)
        assert ours.abs().sum() > 0
        return ours.numel(), int((ours != theirs).sum())


def own_shards(training: Training, config: Config, grid: Grid) -> torch.Tensor:
    """The gradients of a step that this rank updates weights with."""
    training.gradients(iter(micro_batches(config, 0, grid.data_rank, grid.data_size)))
    replicas, replica = grid.axes.replicas, grid.axes.replica(grid.rank)
    buckets = (bucket for chunk in training.chunks for buffer in chunk.buffers for bucket in buffer.buckets)
    return torch.cat([bucket.grad_data.view(replicas, -1)[replica] for bucket in buckets])


@pytest.mark.parametrize("layout", ["tp2-dp2", "tp2-pp2"])
def test_gradients_are_bitwise_those_of_megatron_core(rank_pool: RankPool, layout: str) -> None:
    for elements, differing in rank_pool.run(compare, 4, make_config("griffin", LAYOUTS[layout])):
        assert elements > 0
        assert differing == 0

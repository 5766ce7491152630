"""Checkpoints of trainings on layouts of `tests.layouts`, and the state that they must hold."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from griffin.parallel import sharding
from griffin.parallel.world.grid import Grid
from griffin.trainer.checkpoint import arrays
from griffin.trainer.checkpoint.checkpoints import Checkpoints
from griffin.trainer.checkpoint.source import OWN, Source
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training
from tests.layouts import micro_batches


def state_of(training: Training, grid: Grid) -> dict[str, torch.Tensor]:
    """The model's weights, master weights and moments as global tensors, without any of the checkpoints' code."""

    def full(place: int, parameter: torch.nn.Parameter) -> torch.Tensor:
        value, shard = torch.zeros(parameter.numel()), training.optimizer.shard_state(parameter)
        if shard is not None:
            start, stop = training.optimizer.shard_range(parameter)
            held = shard[place]
            assert held is not None, "a step was made"
            value[start:stop] = held
        value = value.to(grid.device)
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
        return value.view(parameter.shape)

    state = {f"model.{name}": value for name, value in sharding.gather(training.stages, grid).items()}
    for place, kind in enumerate((arrays.MASTER, arrays.EXP_AVG, arrays.EXP_AVG_SQ)):
        gathered = sharding.gather(training.stages, grid, partial(full, place))
        state |= {f"{kind}.{name}": value for name, value in gathered.items()}
    return state


def steps(training: Training, grid: Grid, first: int, last: int) -> list[float]:
    config = training.config
    return [
        training.step(iter(micro_batches(config, step, grid.data_rank, grid.data_size))).loss
        for step in range(first, last)
    ]


def checkpoints(config: Config, grid: Grid, training: Training, root: Path, **options: Any) -> Checkpoints:
    def report(outcome: Any) -> None:
        assert outcome.error is None, outcome

    return Checkpoints(config, grid, training, root, host="127.0.0.1", attempt=1, lock=None, report=report, **options)


def source(folder: Path, step: int) -> Source:
    return Source(rule=OWN, path=folder, everything=True, step=step, config=None, skipped=(), text="")

"""A small model of each family, layouts that it is trained on, and its batches."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from griffin.parallel import sharding
from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.world.grid import rank_grid
from griffin.trainer.settings.sections import Config, DataConfig, OptimizerConfig, TrainConfig
from griffin.trainer.step import Training

STEPS, SEQUENCE, GLOBAL_BATCH, VOCABULARY = 20, 32, 8, 130
LEARNING_RATE = 3e-3
PATTERNS = {
    "griffin": (RECURRENT, RECURRENT, ATTENTION, RECURRENT, RECURRENT),
    "hawk": (RECURRENT,) * 5,
    "mqa": (GLOBAL_ATTENTION,) * 5,
}
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-sequence-parallel": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2, stages=(3, 2)),
    "pp2-interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2, stages=(1, 2, 1, 1)),
    "dp2": ParallelConfig(),
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2, stages=(2, 3)),
    "tp2-dp2": ParallelConfig(tensor=2),
    "tp2-pp2-sequence-parallel": ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True),
    "pp2-dp2": ParallelConfig(pipeline=2),
}
RANKS = {name: (2 if "dp2" in name else 1) * layout.model_ranks for name, layout in LAYOUTS.items()}


def make_config(family: str, layout: ParallelConfig, **train: Any) -> Config:
    return Config(
        model=ModelConfig(
            pattern=PATTERNS[family],
            width=32,
            recurrent_width=48,
            heads=4,
            head_dim=8,
            gate_blocks=4,
            window=10,  # shorter than the sequence
            vocabulary=VOCABULARY,  # padded to 256
            scale_embedding=True,
            logit_soft_cap=30.0,
        ),
        parallel=layout,
        data=DataConfig(sequence_length=SEQUENCE),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, warmup_steps=2, decay_steps=STEPS, clip=0.5, weight_decay=0.1
        ),
        train=TrainConfig(
            **{"steps": STEPS, "global_batch": GLOBAL_BATCH, "micro_batch": 2, "dtype": "float32", **train}
        ),
    )


def global_batch(step: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of packed documents, of 1-3 tokens among others, whose next token mostly follows from the last."""
    generator = torch.Generator().manual_seed(1000 + step)
    samples = []
    for _ in range(GLOBAL_BATCH):
        lengths = itertools.islice(
            itertools.cycle([1, 7, 2, 3, 12, 1, 20]), int(torch.randint(7, (1,), generator=generator)), 30
        )
        positions = torch.tensor([position for length in lengths for position in range(length)])[: SEQUENCE + 1]
        tokens = torch.randint(0, VOCABULARY, (SEQUENCE + 1,), generator=generator)
        for place in range(1, SEQUENCE + 1):
            if positions[place] > 0 and place % 5:
                tokens[place] = (3 * tokens[place - 1] + 1) % VOCABULARY
        mask = (positions[1:] > 0).float()  # no prediction across documents
        samples.append({"tokens": tokens[:-1], "labels": tokens[1:], "positions": positions[:-1], "loss_mask": mask})
    return samples


def micro_batches(config: Config, step: int, data_rank: int, data_size: int) -> list[dict[str, torch.Tensor]]:
    samples, size = global_batch(step), config.train.micro_batch
    places = range(data_rank * size, GLOBAL_BATCH, data_size * size)
    return [
        {key: torch.stack([sample[key] for sample in samples[place : place + size]]) for key in samples[0]}
        for place in places
    ]


def train(ranks: Any, config: Config, steps: int = STEPS) -> dict[str, Any]:
    with rank_grid(config.parallel, ranks) as grid:
        training = Training(config, grid)
        before = sharding.gather(training.stages, grid)
        results = [
            training.step(iter(micro_batches(config, step, grid.data_rank, grid.data_size))) for step in range(steps)
        ]
        held_out, _ = training.evaluate(iter(micro_batches(config, steps, grid.data_rank, grid.data_size)), 1)
        return {
            "before": before,
            "after": sharding.gather(training.stages, grid),
            "loss": [result.loss for result in results],
            "grad_norm": [result.grad_norm for result in results],
            "loss_tokens": [result.loss_tokens for result in results],
            "eval_loss": held_out,
        }


def main_gradient(parameter: Any) -> torch.Tensor:
    return parameter.main_grad

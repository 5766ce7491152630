"""A summary of a training for its console: parameters, layout, tokens and samples."""

from __future__ import annotations

import itertools
import math

from griffin.parallel.config import ModelConfig
from griffin.parallel.sharding import named_pieces
from griffin.parallel.stage import meta_stage, stage_blocks
from griffin.parallel.world.grid import Grid
from griffin.trainer.settings.sections import Config


def summarize(config: Config, world_size: int, grid: Grid) -> str:
    """Three lines: the model, its layout over `world_size` ranks, and the data that the training reads.

    `grid` is the grid of rank 0 in a world of any size; the parameters are counted on it, with meta tensors.
    """
    model, parallel, train = config.model, config.parallel, config.train
    embedding, rest = count_parameters(model, grid)
    axes = " x ".join(f"{axis} {size}" for axis, size in parallel.model_axes.items())
    sizes = stage_blocks(model, parallel, config.data.sequence_length)
    samples = train.steps * train.global_batch
    return (
        f"Model: {embedding + rest:,} parameters, {embedding:,} of them embedding (vocabulary {model.vocabulary:,}); "
        f"{describe_pattern(model.pattern)}\n"
        f"{world_size} rank{'s' * (world_size > 1)}: {axes} x data "
        f"{world_size // parallel.model_ranks}; blocks per stage {', '.join(map(str, sizes))}\n"
        f"Training: {train.steps:,} steps of {train.global_batch:,} sequences of {config.data.sequence_length:,} "
        f"tokens: {samples:,} sequences, {samples * config.data.sequence_length:,} tokens"
    )


def count_parameters(model: ModelConfig, grid: Grid) -> tuple[int, int]:
    """Numbers of (embedding, all other) parameters of the whole model, without the padding of the vocabulary.

    `grid` is the grid of rank 0. Its tensor-parallel size does not matter: pieces have global shapes.
    """
    counts = {piece.name: math.prod(piece.shape) for piece, _ in named_pieces([meta_stage(model, grid)])}
    embedding = counts.pop("embedding.weight")
    return embedding, sum(counts.values())


def describe_pattern(pattern: tuple[str, ...]) -> str:
    """The pattern in short, such as `8 x (2 recurrent, 1 attention), 2 recurrent`: a repeated unit, then the rest."""
    runs = [(mixer, len(list(group))) for mixer, group in itertools.groupby(pattern)]
    for size in (1, 2):
        unit = runs[:size]
        repeats = 0
        while repeats * size < len(runs) and runs[repeats * size : (repeats + 1) * size] == unit:
            repeats += 1
        rest = runs[repeats * size :]
        if repeats > 1 or len(runs) == size:
            text = ", ".join(f"{count} {mixer}" for mixer, count in unit)
            parts = [f"{repeats} x ({text})" if repeats > 1 else text]
            return ", ".join(parts + [f"{count} {mixer}" for mixer, count in rest])
    return ", ".join(f"{count} {mixer}" for mixer, count in runs)

"""`griffin model`: block pattern and exact parameter counts of the presets."""

from __future__ import annotations

import argparse
import itertools
import math


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "model",
        help="print a model's blocks and its exact parameter counts",
        description="Print the block pattern and the exact parameter counts of a model, from meta tensors: no memory "
        "is allocated, whatever the size.",
    )
    parser.add_argument("presets", metavar="PRESET", nargs="*", help="presets to show (default: all)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from griffin.trainer.presets import PRESETS, preset

    models = {name: preset(name) for name in args.presets or PRESETS}  # all names are checked before any is counted
    from griffin.parallel.grid import single_rank_grid

    with single_rank_grid() as grid:
        print(
            f"{'preset':<20} {'width':>6} {'rec.':>6} {'heads':>5} {'blocks':>6}  {'embedding':>15} "
            f"{'non-embedding':>15} {'total':>15}  pattern"
        )
        for name, model in models.items():
            embedding, rest = count_parameters(model, grid)
            print(
                f"{name:<20} {model.width:>6} {model.recurrent_width:>6} {model.heads:>5} {model.blocks:>6}  "
                f"{embedding:>15,} {rest:>15,} {embedding + rest:>15,}  {describe_pattern(model.pattern)}"
            )
    return 0


def count_parameters(model, grid) -> tuple[int, int]:
    """(embedding, all other) parameters of a ModelConfig, without the padding of the vocabulary."""
    from griffin.parallel.sharding import named_pieces
    from griffin.parallel.stage import meta_stage

    counts = {piece.name: math.prod(piece.shape) for piece, _ in named_pieces([meta_stage(model, grid)])}
    embedding = counts.pop("embedding.weight")
    return embedding, sum(counts.values())


def describe_pattern(pattern: tuple[str, ...]) -> str:
    """`8 x (2 recurrent, 1 attention), 2 recurrent`: the shortest repeated unit, then what is left."""
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

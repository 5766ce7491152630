"""`griffin model`: block pattern and exact parameter counts of presets; for configs, also layout and tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from griffin.parallel.config import ModelConfig
from griffin.trainer.settings.complete import complete, read_data, with_vocabulary
from griffin.trainer.settings.load import find_config, read_settings
from griffin.trainer.settings.presets import PRESETS, VOCABULARY, preset
from griffin.trainer.settings.sections import Config
from griffin.trainer.settings.validate import validate_settings


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "model",
        help="print a model's blocks and its exact parameter counts",
        description="Print the block pattern and the exact parameter counts of a model, from meta tensors: no memory "
        "is allocated, whatever the size. For a config, also print the layout and the tokens of its training; its data "
        "need not exist. Any setting of configs can follow as --section.key value.",
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="*", help="presets, or configs: files or packaged ones (default: all presets)"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks of the trainings (default: the fewest possible)")
    parser.set_defaults(run=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    # Check all names before counting any model.
    models: dict[str, ModelConfig] = {}
    configs: dict[str, tuple[Config, int]] = {}
    for name in args.models or PRESETS:
        if _is_config(name):
            config = _load(name, args.overrides)
            configs[name] = config, config.parallel.model_ranks if args.ranks is None else args.ranks
            validate_settings(*configs[name])
        else:
            models[name] = preset(name)
    if args.overrides and models:
        raise ValueError(f"{args.overrides[0]}: settings are for configs; {next(iter(models))} is a preset")
    if args.ranks is not None and models:
        raise ValueError(f"--ranks {args.ranks}: is for configs; {next(iter(models))} is a preset")

    from griffin.parallel.world.grid import single_rank_grid
    from griffin.trainer.summary import count_parameters, describe_pattern, summarize

    with single_rank_grid() as grid:
        if models:
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
        for name, (config, ranks) in configs.items():
            print(f"{name}\n{summarize(config, ranks, grid)}")
            try:
                read_data(config.data)
            except (ValueError, OSError) as error:
                print(f"The data could not be read, which may change the vocabulary: {error}")
    return 0


def _load(name: str, overrides: Sequence[str]) -> Config:
    """Load a config. If its data cannot be read and it states no vocabulary, take that of the presets."""
    config = read_settings(name, overrides)
    try:
        return complete(config)
    except (ValueError, OSError):
        return with_vocabulary(config, VOCABULARY)


def _is_config(name: str) -> bool:
    """Whether a name is a config: a file, or a packaged one. Files take precedence over presets, presets over those."""
    if Path(name).is_file() or name.endswith(".toml"):
        return True
    try:
        return name not in PRESETS and find_config(name).is_file()
    except FileNotFoundError:
        return False

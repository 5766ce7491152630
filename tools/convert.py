"""`griffin convert`: checkpoints from published weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from griffin.tools.checkpoint import DTYPES

MOST_WORKERS = 4  # by default: each has a chunk or two in memory


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("convert", help="make a checkpoint from published weights")
    commands = parser.add_subparsers(required=True, metavar="FORMAT")

    text = (
        "make a checkpoint of a transformers folder of RecurrentGemma: config.json, and model.safetensors or its shards"
    )
    command = add_format(commands, "hf", _hf, text)
    command.add_argument("source", metavar="SRC", type=Path, help="folder that transformers saved or downloaded")
    add_target(command, "step folder to make; must not exist")
    add_dtype(command, "of all weights (default: each as it is stored)")
    add_workers(command)


def add_format(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    return command


def add_target(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("target", metavar="DST", type=Path, help=text)


def add_dtype(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--dtype", choices=DTYPES, help=text)


def add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"processes (default: one per core, at most {MOST_WORKERS}; under mpiexec, its ranks)",
    )


def _hf(args: argparse.Namespace) -> None:
    from griffin.tools.convert_hf import convert_transformers
    from griffin.tools.workers import start_workers

    with start_workers(args.workers, MOST_WORKERS) as workers:
        if workers:
            convert_transformers(args.source, args.target, workers, dtype=DTYPES.get(args.dtype))

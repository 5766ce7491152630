"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from griffin.trainer.dtypes import ALIASES, canonical_dtype

NEWEST_HELP = "step folder, or a run's folder (or its checkpoints folder) for the newest complete step"
MOST_WORKERS = 4  # default limit: each holds a chunk or two in memory


def add_dtype(command: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    """Add --dtype. Any alias is accepted; `args.dtype` is the canonical name, such as "bfloat16"."""
    shown = ", ".join(f"{name} ({aliases[0]})" for name, aliases in ALIASES.items())
    command.add_argument("--dtype", type=_dtype, default=default, metavar="DTYPE", help=f"{text}; accepted: {shown}")


def _dtype(text: str) -> str:
    name = canonical_dtype(text)
    if name not in ALIASES:
        accepted = ", ".join(f"{known} ({', '.join(aliases)})" for known, aliases in ALIASES.items())
        raise argparse.ArgumentTypeError(f"{text!r}: must be one of {accepted}")
    return name


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Add a sub-command that calls `run`; `text` is its help and, as a sentence, its description."""
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    return command


def add_target(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("target", metavar="DST", type=Path, help=text)


def add_workers(command: argparse.ArgumentParser, text: str = "") -> None:
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"processes (default: one per core, at most {MOST_WORKERS}; under mpiexec, its ranks){text}",
    )

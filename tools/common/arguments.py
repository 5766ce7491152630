"""Arguments that several commands have, alike in each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from griffin.trainer.dtypes import ALIASES, canonical_dtype

NEWEST_HELP = "folder of a step; of a run or its checkpoints, the newest complete one is taken"
MOST_WORKERS = 4  # by default: each has a chunk or two in memory


def add_dtype(command: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    """--dtype, under any of its names; the arguments have the canonical one, such as "bfloat16"."""
    shown = ", ".join(f"{name} ({aliases[0]})" for name, aliases in ALIASES.items())
    command.add_argument("--dtype", type=_dtype, default=default, metavar="DTYPE", help=f"{text}: {shown}")


def _dtype(text: str) -> str:
    name = canonical_dtype(text)
    if name not in ALIASES:
        accepted = ", ".join(f"{known} ({', '.join(aliases)})" for known, aliases in ALIASES.items())
        raise argparse.ArgumentTypeError(f"{text!r}: must be one of {accepted}")
    return name


def add_format(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
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

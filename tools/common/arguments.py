"""The argument --dtype, alike in every command that has one."""

from __future__ import annotations

import argparse

from griffin.trainer.dtypes import ALIASES, canonical_dtype


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

"""The command `griffin`: one sub-command per file of `commands/`."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor

import griffin
from griffin.tools.common.errors import USER_ERRORS, report

# Each has `add_parser(subparsers)`, which sets `run`: args -> exit code or None. They import torch inside `run` only.
COMMANDS = (
    "data",
    "model",
    "train",
    "launch",
    "monitor",
    "plot",
    "doctor",
    "checkpoint",
    "convert",
    "export",
    "generate",
    "logits",
    "bench",
)

OVERRIDE = re.compile(r"--[a-z_]+\.[a-z_0-9]+")
BLEND_ENTRY = re.compile(r"[0-9.]\S*\s+\S")  # "WEIGHT PREFIX": no other argument looks like it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code; 2 with one line on stderr for what the user can put right.

    It is 1, with one line too, where a worker process was killed.
    """
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="griffin", description="Train Griffin and Hawk language models.")
    parser.add_argument("--version", action="version", version=f"griffin-megatron {griffin.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"griffin.tools.commands.{name}").add_parser(subparsers)
    args = parser.parse_args(words)
    if "overrides" in args:
        args.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("griffin: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # who reads the output has seen enough; nor is it flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except BrokenExecutor:
        print("griffin: error: a worker process was killed: out of memory? (--workers takes fewer)", file=sys.stderr)
        return 1
    except USER_ERRORS as error:
        return report(error)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the settings, "--section.key value" or "--section.key=value", from the other arguments.

    Several "WEIGHT PREFIX" may follow one setting.

    A sub-command takes them where it sets a default for `overrides`.
    """
    rest: list[str] = []
    overrides: list[str] = []
    awaited = False  # the value of the setting just read
    continues = False  # a setting whose value stands in words of its own
    for word in words:
        is_override = OVERRIDE.match(word) is not None
        awaited = awaited and not word.startswith("--")
        belongs = is_override or awaited or (continues and BLEND_ENTRY.match(word) is not None)
        (overrides if belongs else rest).append(word)
        continues = belongs and not (is_override and "=" in word)
        awaited = is_override and "=" not in word
    return rest, overrides


if __name__ == "__main__":
    sys.exit(main())

"""The command `griffin`: one sub-command per file in `commands/`."""

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

# Each module has `add_parser(subparsers)`, which sets `run`: args -> exit code or None. Only `run` imports torch.
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
    """Run one sub-command and return its exit code.

    It is 2, with one line on stderr, for mistakes of the user, and 1, also with one line, if a worker process was
    killed. Other exceptions propagate.
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
    except BrokenPipeError:  # the reader has closed the output; it must not be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except BrokenExecutor:
        print("griffin: error: a worker process was killed: out of memory? (try fewer --workers)", file=sys.stderr)
        return 1
    except USER_ERRORS as error:
        return report(error)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the settings, "--section.key value" or "--section.key=value", from the other arguments.

    Several "WEIGHT PREFIX" words may follow one setting. A sub-command accepts settings by setting a default for
    `overrides`.
    """
    rest: list[str] = []
    overrides: list[str] = []
    awaited = False  # the next word is the value of the last setting
    continues = False  # the last setting can have more values
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

"""The command `griffin`: one sub-command per file of `commands/`."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import re
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor

# Each has `add_parser(subparsers)`, which sets `run`: args -> exit code or None. They import torch inside `run` only.
COMMANDS = (
    "data",
    "model",
    "train",
    "launch",
    "monitor",
    "doctor",
    "checkpoint",
    "convert",
    "export",
    "generate",
    "logits",
    "bench",
)

# An OSError is what the system refuses: a permission, a name that is too long, a full disk.
USER_ERRORS = (ValueError, OSError)
OVERRIDE = re.compile(r"--[a-z_]+\.[a-z_0-9]+")
BLEND_ENTRY = re.compile(r"[0-9.]\S*\s+\S")  # "WEIGHT PREFIX": no other argument looks like it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code; 2 with one line on stderr for what the user can put right.

    It is 1, with one line too, where a worker process was killed.
    """
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="griffin", description="Train Griffin and Hawk language models.")
    parser.add_argument("--version", action="version", version=f"griffin-megatron {_version()}")
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


def _version() -> str:
    try:
        return importlib.metadata.version("griffin-megatron")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is on the path only
        return "(not installed)"


def report(error: Exception) -> int:
    """Say what the user can put right, and return the exit code that says so."""
    print(f"griffin: error: {described(error)}", file=sys.stderr)
    return 2


def described(error: BaseException) -> str:
    """An error in words, without what a terminal would take for a command: names are anybody's."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror is not None:  # raised by the system, not by a check
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        message = error.strerror if name is None else f"{name}: {error.strerror}"
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in message)


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

"""Errors that users can put right, and how they are said."""

from __future__ import annotations

import os
import sys

# An OSError is what the system refuses: a permission, a name that is too long, a full disk.
USER_ERRORS = (ValueError, OSError)


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

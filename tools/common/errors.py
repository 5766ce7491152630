"""Errors that users can fix, and how they are printed."""

from __future__ import annotations

import os
import sys

# OSError: what the system refuses, such as a permission, a name that is too long, or a full disk.
USER_ERRORS = (ValueError, OSError)


def report(error: Exception) -> int:
    """Print an error of the user on stderr and return its exit code."""
    print(f"griffin: error: {error_text(error)}", file=sys.stderr)
    return 2


def error_text(error: BaseException) -> str:
    """Return an error's message with control characters escaped: file names in it could hold terminal commands."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror is not None:  # raised by the system
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        message = error.strerror if name is None else f"{name}: {error.strerror}"
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in message)

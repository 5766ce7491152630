"""Safe reading of untrusted files: regular files of bounded size, and JSON and TOML of bounded depth."""

from __future__ import annotations

import errno
import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any, BinaryIO

SETTINGS_BYTES = 2**20  # most bytes of a file that people write
MOST_BYTES = 64 * 2**20  # most bytes of any file that is read whole; a manifest of 100,000 chunks has 12 MB


def open_regular(path: str | Path, *, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading; `buffering` as for `open`. OSError naming it for a FIFO, device or folder."""
    # Non-blocking: opening a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "must be a regular file", str(path))
        return open(descriptor, "rb", buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """Read a regular file of at most `most` bytes. OSError naming the file for anything else."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {most:,} bytes, the most that are read", str(path))
    return content


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. ValueError if it is invalid, nested too deeply, or has a key twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML. ValueError if it is invalid or nested too deeply."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def is_integer(value: Any, least: int, most: int) -> bool:
    """Whether a value is an integer from `least` to `most`. True and False are not."""
    return type(value) is int and least <= value <= most


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return values

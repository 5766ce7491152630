"""Reading files that anybody may have made: regular files only, of a bounded size, and JSON and TOML of any depth."""

from __future__ import annotations

import errno
import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any, BinaryIO

SETTINGS_BYTES = 2**20  # of a file that people write
MOST_BYTES = 64 * 2**20  # of any file that is read whole; a manifest of 100,000 chunks has 12 MB


def open_regular(path: str | Path, *, buffering: int = -1) -> BinaryIO:
    """A regular file, open to be read, `buffering` as of `open`. OSError naming it for FIFO, device or folder."""
    # Not blocking: opening a FIFO would wait for who writes to it.
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
    """All of a regular file of at most `most` bytes. OSError naming it for anything else."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {most:,} bytes, the most that are read", str(path))
    return content


def parse_json(text: str | bytes) -> Any:
    """The value of JSON. ValueError for anything else, for nesting too deep to read, and for a key given twice."""
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of TOML. ValueError for anything else, and for nesting too deep to read."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def is_integer(value: Any, least: int, most: int) -> bool:
    """Whether a value that was read is an integer in least ... most; true and false are none."""
    return type(value) is int and least <= value <= most


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return values

"""Reading growing files of JSON lines from their end; they may have hundreds of megabytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffin.trainer.files import open_regular, parse_json


def lines_from_end(path: Path, *, block: int = 2**20, longest: int = 16 * 2**20) -> Iterator[dict[str, Any]]:
    """The objects of the file, last first; none if there is no file. OSError naming a path that is no regular file.

    Truncated lines are skipped, and so is everything before a line of more than `longest` bytes; no run writes a longer
    one. The file is read `block` bytes at a time.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        place, rest = file.seek(0, os.SEEK_END), b""
        while place > 0:
            size = min(block, place)
            place -= size
            file.seek(place)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            yield from filter(None, map(parse_line, reversed(lines)))
            if len(rest) > longest:
                return
        if (first := parse_line(rest)) is not None:
            yield first


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if it is none, such as a line truncated by a kill or a full disk."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class Follower:
    """Reads the last `last` bytes of a file of JSON lines, and then what is appended between calls (likewise)."""

    def __init__(self, path: Path, last: int = 4 * 2**20):
        self._path, self._last = path, last
        self._place: int | None = None  # offset of the first line that was not read
        self._file: tuple[int, int] | None = None  # device and inode

    def read(self) -> list[dict[str, Any]]:
        """The objects of the complete lines since the last call; none if the file cannot be read.

        A file that was replaced is read from its beginning.
        """
        try:
            with open_regular(self._path) as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                place, earliest = self._place, status.st_size - self._last
                if place is None or identity != self._file or status.st_size < place:
                    place = 0
                is_whole = earliest <= place
                place = max(place, earliest)
                file.seek(place)
                data = file.read(self._last)
        except FileNotFoundError:
            self._place = None
            return []
        except OSError:  # network file systems have errors at times; the next call tries again
            return []
        lines = data.split(b"\n")
        self._file, self._place = identity, place + len(data) - len(lines[-1])
        return list(filter(None, map(parse_line, lines[0 if is_whole else 1 : -1])))

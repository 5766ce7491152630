"""Files of lines that a run writes for people, and does not end for."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class LogFile:
    """Appends lines to a file that other attempts may have begun; an OSError is never raised.

    Where a line cannot be written (the disk is full, the folder is gone) it is lost. `say` is told the first time, and
    each later line is tried again, so that those after a repair are there.
    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self._path = path
        self._say = say
        self._file: io.FileIO | None = None
        self._has_failed = False

    def write(self, text: str) -> None:
        """Append `text`, of whole lines, and leave nothing in a buffer."""
        rest = memoryview(text.encode())
        try:
            if self._file is None:
                self._file = io.FileIO(self._path, "a+")
                if _ends_within_a_line(self._file):  # a process was killed while it wrote, or a disk was full
                    rest = memoryview(b"\n" + bytes(rest))
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:  # some network file systems only say now that there was no room
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        file, self._file = self._file, None  # the next line finds out how much of this one is there
        if file is not None:
            with suppress(OSError):
                file.close()
        if not self._has_failed:
            self._has_failed = True
            self._say(f"{self._path.name} cannot be written: {error}; training goes on without it")


def _ends_within_a_line(file: io.FileIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"

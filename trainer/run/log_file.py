"""Log files of a run, whose write errors do not end it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class LogFile:
    """Appends lines to a file, which earlier attempts may have begun. It never raises an OSError.

    A line that cannot be written (a full disk, a deleted folder) is lost. `say` is called the first time. Each later
    line is tried again, so that lines after a repair are written.
    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self._path = path
        self._say = say
        self._file: io.FileIO | None = None
        self._has_failed = False

    def write(self, text: str) -> None:
        """Append `text`, which consists of whole lines, unbuffered."""
        rest = memoryview(text.encode())
        try:
            if self._file is None:
                self._file = io.FileIO(self._path, "a+")
                if _ends_within_a_line(self._file):  # a process was killed while writing, or the disk was full
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
            except OSError as error:  # some network file systems report a full disk only now
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        file, self._file = self._file, None  # the next `write` checks how much of this line was written
        if file is not None:
            with suppress(OSError):
                file.close()
        if not self._has_failed:
            self._has_failed = True
            self._say(f"{self._path.name} cannot be written: {error}; training continues without it")


def _ends_within_a_line(file: io.FileIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"

"""Whether all hosts write the same run folder: each must see a file of rank 0, and rank 0 one of each."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE_SECONDS = 10.0  # network file systems keep what they know of a folder for some seconds
POLL_SECONDS = 0.05


@contextmanager
def meeting_place(run_dir: Path) -> Iterator[Path]:
    """A new folder in `run_dir` with rank 0's file in it, for rank 0; nothing of it is left at the end."""
    place = run_dir / f".preflight-{secrets.token_hex(8)}"
    try:
        place.mkdir()
        _file(place, 0).write_text(place.name, encoding="ascii")
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def visit(place: Path, rank: int) -> str:
    """Look for rank 0's file in `place` and write one for `rank`; what is wrong, "" where nothing is."""
    if not _appears(_file(place, 0), place.name, PATIENCE_SECONDS):
        return f"does not see {place.parent.absolute()} as rank 0 has written it: the run folder must be shared"
    try:
        _file(place, rank).write_text(place.name, encoding="ascii")
    except OSError as error:
        return f"cannot write in {place.parent.absolute()}: {error.strerror}"
    return ""


def unseen(place: Path, ranks: Sequence[int]) -> list[int]:
    """Those of `ranks` whose files rank 0 does not see within some seconds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    return [rank for rank in ranks if not _appears(_file(place, rank), place.name, deadline - time.monotonic())]


def _file(place: Path, rank: int) -> Path:
    return place / f"rank-{rank}"


def _appears(path: Path, text: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            if path.read_text(encoding="ascii") == text:  # opening asks the server, a mere stat may not
                return True
        except OSError:
            pass
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)

"""Check that all hosts share the run folder: each must see a file of rank 0, and rank 0 a file of each."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE_SECONDS = 10.0  # network file systems cache the contents of a folder for some seconds
POLL_SECONDS = 0.05


@contextmanager
def probe_folder(run_dir: Path) -> Iterator[Path]:
    """On rank 0, create a temporary folder in `run_dir` with rank 0's file in it. It is removed at the end."""
    folder = run_dir / f".preflight-{secrets.token_hex(8)}"
    try:
        folder.mkdir()
        _file(folder, 0).write_text(folder.name, encoding="ascii")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probe(folder: Path, rank: int) -> str:
    """Look for rank 0's file in `folder`, and write one for `rank`. Returns the problem, or ""."""
    if not _appears(_file(folder, 0), folder.name, PATIENCE_SECONDS):
        return f"does not see {folder.parent.absolute()} as rank 0 has written it: the run folder must be shared"
    try:
        _file(folder, rank).write_text(folder.name, encoding="ascii")
    except OSError as error:
        return f"cannot write in {folder.parent.absolute()}: {error.strerror}"
    return ""


def unseen(folder: Path, ranks: Sequence[int]) -> list[int]:
    """Those of `ranks` whose files rank 0 does not see within some seconds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    return [rank for rank in ranks if not _appears(_file(folder, rank), folder.name, deadline - time.monotonic())]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def _appears(path: Path, text: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            if path.read_text(encoding="ascii") == text:  # opening asks the server, stat may not
                return True
        except OSError:
            pass
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)

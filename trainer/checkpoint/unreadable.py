"""A file in the run folder that lists the checkpoints which the last start could not read, for the next start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from griffin.trainer.checkpoint.source import OWN, Source
from griffin.trainer.checkpoint.steps import steps
from griffin.trainer.checkpoint.zarr_io import CheckpointError

NAME = "unreadable-checkpoints"  # a line each: the folder's name, and what is wrong; job.sbatch reads it too


def record_skipped(run_dir: Path, checkpoints: Path, source: Source) -> None:
    """Start the file anew with the checkpoints that `source` skipped; remove it if there are none."""
    newer = [folder.name for step, folder in reversed(steps(checkpoints)) if step > source.step]
    with suppress(OSError):  # a full disk: nothing depends on the file
        (run_dir / NAME).unlink(missing_ok=True)
        if source.skipped:
            _append(run_dir, zip(newer, source.skipped, strict=False))


@contextmanager
def recording_failure(run_dir: Path, source: Source) -> Iterator[None]:
    """Add `source` to the file, if it is a checkpoint of the run and loading it fails."""
    try:
        yield
    except CheckpointError as error:
        if source.rule == OWN and source.path is not None:
            with suppress(OSError):
                _append(run_dir, [(source.path.name, str(error))])
        raise


def why_unreadable(run_dir: Path, folder: Path) -> str:
    """What the last start found wrong with a step's folder; "" if nothing, or if it was saved again since."""
    try:
        if folder.stat().st_mtime > (run_dir / NAME).stat().st_mtime:
            return ""
        lines = (run_dir / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((text for name, _, text in (line.partition(" ") for line in lines) if name == folder.name), "")


def _append(run_dir: Path, found: Iterable[tuple[str, str]]) -> None:
    with (run_dir / NAME).open("a", encoding="utf-8") as file:
        file.write("".join(f"{name} {' '.join(text.split())}\n" for name, text in found))

"""The steps of a checkpoints folder: found, resolved, retained, and cleaned of what was left over."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from griffin.trainer.checkpoint.manifest import MANIFEST, check
from griffin.trainer.checkpoint.zarr_io import CheckpointError, naming, synchronise
from griffin.trainer.run.step_name import step_name

_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"step-\d{8,}(\.[0-9a-f]+)?\.(tmp|deleted)")


def steps(root: Path) -> list[tuple[int, Path]]:
    """The steps in a checkpoints folder by their names, ascending; none if there is no such folder."""
    with naming(root):
        try:
            found = [(match, entry) for entry in root.iterdir() if (match := _STEP.fullmatch(entry.name))]
        except FileNotFoundError:
            return []
    return sorted((int(match[1]), entry) for match, entry in found)


def newest_complete(root: Path, before: int | None = None) -> tuple[Path | None, list[CheckpointError]]:
    """The newest step (`before` that one, if given) that passes `check`, and what is wrong with the newer ones."""
    damaged = []
    for step, folder in reversed(steps(root)):
        if before is not None and step >= before:
            continue
        try:
            check(folder)
        except CheckpointError as error:
            damaged.append(error)
        else:
            return folder, damaged
    return None, damaged


def resolve(path: Path) -> Path:
    """The step's folder that a user means by a step's folder, a checkpoints folder or a run's folder.

    Of a folder of steps it is the newest complete one. A step's folder is not looked into.

    Raises:
        CheckpointError: there is no checkpoint, or none is complete.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if (path / MANIFEST).exists() or _STEP.fullmatch(path.name):
        return path
    root = next((root for root in (path, path / "checkpoints") if steps(root)), None)
    if root is None:
        raise CheckpointError(f"{path} is no checkpoint: it has no {MANIFEST}, no step-* and no checkpoints/step-*")
    folder, damaged = newest_complete(root)
    if folder is None:
        raise CheckpointError(f"{root} has no complete checkpoint:\n" + "\n".join(map(str, damaged)))
    return folder


def retain(root: Path, keep_last: int, keep_every: int, newest: int) -> list[Path]:
    """Remove steps before `newest`, which has just been committed, and return their former folders.

    Only what a training can go on from is counted and removed: complete steps with an optimizer's state. Nothing is
    removed if `newest` itself is not one. Later steps, as of an attempt before, are left alone.

    Args:
        keep_last: number of steps to keep, `newest` among them; 0 keeps all.
        keep_every: steps that are multiples of it are kept; 0 keeps none.
    """
    if keep_last == 0 or not _is_resumable(root / step_name(newest)):
        return []
    kept, removed = 1, []
    for step, folder in reversed(steps(root)):
        if step >= newest or not _is_resumable(folder):
            continue
        if kept < keep_last:
            kept += 1
        elif not (keep_every and step % keep_every == 0):
            _remove(folder)
            removed.append(folder)
    return removed


def _is_resumable(folder: Path) -> bool:
    try:
        return check(folder).optimizer is not None
    except CheckpointError:
        return False


def _remove(folder: Path) -> None:
    deleted = folder.with_name(f"{folder.name}.deleted")
    with naming(folder):
        if deleted.exists():
            shutil.rmtree(deleted)
        folder.rename(deleted)  # at once: a step that is half removed must not carry a step's name
        synchronise(folder.parent)
        shutil.rmtree(deleted)


def clean(root: Path) -> list[Path]:
    """Remove what writes and removals that were interrupted left; for the only writer of the folder, while idle.

    What cannot be removed stays: no name of it is that of a step.
    """
    with naming(root):
        try:
            leftovers = [path for path in root.iterdir() if _LEFTOVER.fullmatch(path.name)]
        except FileNotFoundError:
            return []
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in leftovers if not path.exists()]

"""The steps of a checkpoints folder: find, resolve, retain and clean them."""

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
    """The steps of a checkpoints folder by their folders' names, ascending; none if the folder does not exist."""
    with naming(root):
        try:
            found = [(match, entry) for entry in root.iterdir() if (match := _STEP.fullmatch(entry.name))]
        except FileNotFoundError:
            return []
    return sorted((int(match[1]), entry) for match, entry in found)


def newest_complete(root: Path, before: int | None = None) -> tuple[Path | None, list[CheckpointError]]:
    """The newest step (below `before`, if given) that passes `check`, and the errors of the newer ones."""
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
    """The step's folder that a user means by the path of a step, a checkpoints folder or a run folder.

    Of a checkpoints or run folder it is the newest complete step. The path of a step is returned unchecked.

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
    """Remove steps before `newest`, which has just been committed. Returns the removed folders.

    Only steps that a training can resume from count and are removed: complete ones with optimizer state. Nothing is
    removed if `newest` is not such a step. Later steps, as of an earlier attempt, are left alone.

    Args:
        keep_last: number of steps to keep, including `newest`; 0 keeps all.
        keep_every: multiples of this step are kept as well; 0 adds none.
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
        folder.rename(deleted)  # first: a partly removed step must not have a step's name
        synchronise(folder.parent)
        shutil.rmtree(deleted)


def clean(root: Path) -> list[Path]:
    """Remove the leftovers of interrupted writes and removals, and return their paths.

    To be called by the only writer of the folder, while no save is in progress. What cannot be removed stays: it does
    not have a step's name.
    """
    with naming(root):
        try:
            leftovers = [path for path in root.iterdir() if _LEFTOVER.fullmatch(path.name)]
        except FileNotFoundError:
            return []
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in leftovers if not path.exists()]

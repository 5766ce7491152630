"""The part of rank 0's saving process: begins a step's folder, collects what every rank has written, and commits it."""

from __future__ import annotations

import os
import selectors
import shutil
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin.trainer.checkpoint.arrays import ArraySpec
from griffin.trainer.checkpoint.header import Header
from griffin.trainer.checkpoint.manifest import Manifest, begin, commit
from griffin.trainer.checkpoint.saving.exchange import CONNECT_SECONDS, CONTROL, Channel, Exchange, NoAnswerError
from griffin.trainer.checkpoint.steps import clean, retain
from griffin.trainer.checkpoint.zarr_io import CheckpointError, FileRecord
from griffin.trainer.run.lock import holds, is_taken_over
from griffin.trainer.run.step_name import step_name

SIGN_OF_LIFE_SECONDS = 5.0
PARTING_SECONDS = 10.0  # patience with ranks that let go of a failed save


class GivenUpError(Exception):
    """A save that is given up; the message says whose fault it is."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where and what rank 0 commits."""

    root: Path  # of all steps
    arrays: tuple[ArraySpec, ...]
    keep_last: int
    keep_every: int
    lock: tuple[Path, str] | None  # the run folder's lock file, and the token that makes it this run's


def coordinate(
    target: Target, step: int, header: Header, exchange: Exchange, own: Channel, ranks: int, timeout: float
) -> None:
    """See one save through, and tell every rank (rank 0 over `own`) its end: {"path", "bytes", "error", "warning"}.

    Returns once no rank writes to the step's folder any longer, which is removed if the save failed.
    """
    channels, folder = {0: own}, None
    verdict: dict[str, Any] = {"path": None, "bytes": 0, "error": None, "warning": None}
    try:
        # Sooner than those that are here would give this process up.
        channels |= _accept_all(exchange, ranks, min(CONNECT_SECONDS, timeout / 2))
        missing = [rank for rank in range(ranks) if rank not in channels]
        if missing:
            raise GivenUpError(f"{exchange.peer(missing[0])} did not connect")
        # Every rank is here, so that none writes to an earlier save's folder any longer.
        _assert_ours(target)
        clean(target.root)
        folder = begin(target.root, step, target.lock[1][:8] if target.lock is not None else "")
        for channel in channels.values():
            channel.send_message({"folder": str(folder), "inode": os.stat(folder).st_ino})
        files = _collect(channels, timeout)
        manifest = Manifest.of(header, target.arrays, files)
        _assert_ours(target)
        verdict["path"] = str(commit(folder, manifest, target.root / step_name(step)))
        verdict["bytes"] = sum(record.size for record in files.values())
    except Exception as error:
        verdict["error"] = describe(error)
    else:
        try:
            retain(target.root, target.keep_last, target.keep_every, step)
        except Exception as error:
            verdict["warning"] = f"old checkpoints could not be removed: {describe(error)}"
    for channel in channels.values():
        with suppress(ConnectionError):
            channel.send_message(verdict)
    if verdict["error"] is not None and folder is not None and _all_gone(channels.values()):
        shutil.rmtree(folder, ignore_errors=True)


def standing(root: Path, step: int, inode: int | None) -> Path | None:
    """The step's folder if it is the one that was begun with this inode, and was committed; then made durable.

    For who has lost sight of the process that commits.
    """
    folder = root / step_name(step)
    try:
        if inode is None or os.stat(folder).st_ino != inode:
            return None
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return folder


def describe(error: BaseException) -> str:
    """An expected failure's text; of any other one the type as well, and its trace on stderr."""
    if isinstance(error, OSError | CheckpointError | GivenUpError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"


def _accept_all(exchange: Exchange, ranks: int, seconds: float) -> dict[int, Channel]:
    """The connections of the other ranks, of those that connect in time."""
    deadline, channels = time.monotonic() + seconds, {}
    for rank in range(1, ranks):
        with suppress(ConnectionError):
            channels[rank] = exchange.accept(rank, CONTROL, max(0, deadline - time.monotonic()))
    return channels


def _assert_ours(target: Target) -> None:
    if target.lock is None or holds(*target.lock):
        return
    path, token = target.lock
    if is_taken_over(path, token):
        raise GivenUpError(f"{path} is no longer this run's: another run has taken the folder over")
    raise GivenUpError(f"{path} is gone; without it another run may write the folder as well")


def _collect(channels: dict[int, Channel], timeout: float) -> dict[str, FileRecord]:
    """Every rank's files. GivenUpError or ConnectionError as soon as one fails, is gone, or is silent for too long."""
    files: dict[str, FileRecord] = {}
    busy = set(channels)
    interval = min(SIGN_OF_LIFE_SECONDS, timeout / 4)
    asked = time.monotonic()
    heard = dict.fromkeys(channels, asked)
    with selectors.DefaultSelector() as selector:
        for rank, channel in channels.items():
            selector.register(channel, selectors.EVENT_READ, rank)
        while busy:
            for key, _ in selector.select(interval):
                rank = key.data
                message = channels[rank].receive_message()
                heard[rank] = time.monotonic()
                if "error" in message:
                    raise GivenUpError(message["error"])
                if "files" in message:
                    busy.discard(rank)
                    for name, record in message["files"].items():
                        assert name not in files, f"{name} has two writers"
                        files[name] = FileRecord(*record)
            now = time.monotonic()
            if now - asked >= interval:
                asked = now
                silent = [rank for rank in channels if now - heard[rank] > timeout]
                if silent:
                    raise GivenUpError(f"no sign of life from {channels[silent[0]].peer} for {timeout:g} s")
                for channel in channels.values():
                    channel.send_message({"alive": True})
    return files


def _all_gone(channels: Iterable[Channel]) -> bool:
    """Whether every rank has let go of a failed save, after some patience."""
    deadline = time.monotonic() + PARTING_SECONDS
    for channel in channels:
        try:
            while True:
                channel.set_timeout(max(0.01, deadline - time.monotonic()))
                channel.receive_message()
        except NoAnswerError:
            return False
        except ConnectionError:
            continue
    return True

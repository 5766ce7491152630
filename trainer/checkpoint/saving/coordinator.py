"""Coordinate a save in rank 0's saving process: create the step's folder, collect all ranks' files, commit the step."""

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
from griffin.trainer.checkpoint.saving.exchange import CONNECT_SECONDS, CONTROL, Channel, Exchange, PeerTimeoutError
from griffin.trainer.checkpoint.steps import clean, retain
from griffin.trainer.checkpoint.zarr_io import CheckpointError, FileRecord
from griffin.trainer.run.lock import holds, is_taken_over
from griffin.trainer.run.step_name import step_name

HEARTBEAT_SECONDS = 5.0
ABORT_SECONDS = 10.0  # to wait for ranks to disconnect after a failed save


class SaveAbortedError(Exception):
    """A save was aborted; the message says what caused it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What rank 0 commits, and where."""

    root: Path  # the checkpoints folder
    arrays: tuple[ArraySpec, ...]
    keep_last: int
    keep_every: int
    lock: tuple[Path, str] | None  # the run folder's lock file, and the token that this run wrote to it


def coordinate(
    target: Target, step: int, header: Header, exchange: Exchange, own: Channel, ranks: int, timeout: float
) -> None:
    """Run one save, and send its result to every rank (rank 0's over `own`): {"path", "bytes", "error", "warning"}.

    After a failure, removes the step's folder once no rank can write to it.
    """
    channels, folder = {0: own}, None
    result: dict[str, Any] = {"path": None, "bytes": 0, "error": None, "warning": None}
    try:
        # In less time than after which the connected ranks would consider this process lost.
        channels |= _accept_all(exchange, ranks, min(CONNECT_SECONDS, timeout / 2))
        missing = [rank for rank in range(ranks) if rank not in channels]
        if missing:
            raise SaveAbortedError(f"{exchange.peer(missing[0])} did not connect")
        # Every rank has connected, so none still writes to an earlier save's folder.
        _require_lock(target)
        clean(target.root)
        folder = begin(target.root, step, target.lock[1][:8] if target.lock is not None else "")
        for channel in channels.values():
            channel.send_message({"folder": str(folder), "inode": os.stat(folder).st_ino})
        files = _collect(channels, timeout)
        manifest = Manifest.of(header, target.arrays, files)
        _require_lock(target)
        result["path"] = str(commit(folder, manifest, target.root / step_name(step)))
        result["bytes"] = sum(record.size for record in files.values())
    except Exception as error:
        result["error"] = describe(error)
    else:
        try:
            retain(target.root, target.keep_last, target.keep_every, step)
        except Exception as error:
            result["warning"] = f"old checkpoints could not be removed: {describe(error)}"
    for channel in channels.values():
        with suppress(ConnectionError):
            channel.send_message(result)
    if result["error"] is not None and folder is not None and _all_disconnected(channels.values()):
        shutil.rmtree(folder, ignore_errors=True)


def find_committed(root: Path, step: int, inode: int | None) -> Path | None:
    """The step's folder if it is the committed folder with this inode; its name is then synchronised to disk.

    For a rank that has lost its connection to the process that commits.
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
    """The message of an expected error; for any other error its type as well, and the traceback on stderr."""
    if isinstance(error, OSError | CheckpointError | SaveAbortedError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"


def _accept_all(exchange: Exchange, ranks: int, seconds: float) -> dict[int, Channel]:
    """The connections of the other ranks that connect in time."""
    deadline, channels = time.monotonic() + seconds, {}
    for rank in range(1, ranks):
        with suppress(ConnectionError):
            channels[rank] = exchange.accept(rank, CONTROL, max(0, deadline - time.monotonic()))
    return channels


def _require_lock(target: Target) -> None:
    if target.lock is None or holds(*target.lock):
        return
    path, token = target.lock
    if is_taken_over(path, token):
        raise SaveAbortedError(f"{path} is no longer this run's: another run has taken the folder over")
    raise SaveAbortedError(f"{path} is gone; without it another run may write the folder as well")


def _collect(channels: dict[int, Channel], timeout: float) -> dict[str, FileRecord]:
    """Every rank's files. Raises SaveAbortedError or ConnectionError once a rank fails, disconnects or times out."""
    files: dict[str, FileRecord] = {}
    unfinished = set(channels)
    interval = min(HEARTBEAT_SECONDS, timeout / 4)
    last_heartbeat = time.monotonic()
    last_message = dict.fromkeys(channels, last_heartbeat)
    with selectors.DefaultSelector() as selector:
        for rank, channel in channels.items():
            selector.register(channel, selectors.EVENT_READ, rank)
        while unfinished:
            for key, _ in selector.select(interval):
                rank = key.data
                message = channels[rank].receive_message()
                last_message[rank] = time.monotonic()
                if "error" in message:
                    raise SaveAbortedError(message["error"])
                if "files" in message:
                    unfinished.discard(rank)
                    for name, record in message["files"].items():
                        assert name not in files, f"{name} has two writers"
                        files[name] = FileRecord(*record)
            now = time.monotonic()
            if now - last_heartbeat >= interval:
                last_heartbeat = now
                silent = [rank for rank in channels if now - last_message[rank] > timeout]
                if silent:
                    raise SaveAbortedError(f"no sign of life from {channels[silent[0]].peer} for {timeout:g} s")
                for channel in channels.values():
                    channel.send_message({"alive": True})
    return files


def _all_disconnected(channels: Iterable[Channel]) -> bool:
    """Whether every rank disconnects within ABORT_SECONDS of a failed save."""
    deadline = time.monotonic() + ABORT_SECONDS
    for channel in channels:
        try:
            while True:
                channel.set_timeout(max(0.01, deadline - time.monotonic()))
                channel.receive_message()
        except PeerTimeoutError:
            return False
        except ConnectionError:
            continue
    return True

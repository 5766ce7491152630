"""A rank's share of a save: files that it reports are on disk, and a failure leaves no file open."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from griffin.trainer.checkpoint.saving.protocol import Setup
from griffin.trainer.checkpoint.saving.share import Share
from tests.saving import Layout, random_state


class Reports:
    """Receives the one report of a share."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.has_come = threading.Event()

    def __call__(self, message: dict[str, Any]) -> None:
        assert not self.has_come.is_set()
        self.found = message
        self.has_come.set()


@contextmanager
def share_of_one(folder: Path, report: Any) -> Iterator[Share]:
    """The share of a single rank, which has no other to exchange values with."""
    layout = Layout(1, 1)
    folder.mkdir()
    staged = np.empty((3, layout.plans[0].elements), np.float32)
    layout.stage(random_state(1), 0, staged)
    unused: Any = None
    setup = Setup(rank=0, parent=0, world_size=1, host="here", key=b"", plan=layout.plans[0], target=unused, timeout=30)
    share = Share(setup, staged, unused, folder, report)
    yield share
    share.abort()
    assert share.join()


def open_below(folder: Path) -> list[str]:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [path for link in links if os.path.lexists(link) and (path := os.readlink(link)).startswith(str(folder))]


def test_reported_files_are_synchronised(tmp_path: Path) -> None:
    synchronised, fsync = set(), os.fsync

    def observed(descriptor: int) -> None:
        fsync(descriptor)
        synchronised.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    folder, when_reported = tmp_path / "step", set[Path]()
    reports = Reports()

    def report(message: dict[str, Any]) -> None:
        when_reported.update(synchronised)
        reports(message)

    with mock.patch("os.fsync", observed), share_of_one(folder, report):
        assert reports.has_come.wait(60)
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert {folder / name for name in reports.found["files"]} == {path for path in files if path.name != "zarr.json"}
    assert when_reported == files | {path.parent for path in files}
    assert open_below(folder) == []


@pytest.mark.parametrize("harm", ["no space to write", "no space to synchronise", "aborted"])
def test_a_share_that_fails_leaves_no_file_open(tmp_path: Path, harm: str) -> None:
    """A removed file keeps its disk space while it is open, and the next save may need it."""
    folder, reports, write_begun = tmp_path / "step", Reports(), threading.Semaphore(0)
    count, lock, fsync, fadvise = 0, threading.Lock(), os.fsync, os.posix_fadvise

    def failing(expected: str, call: Any, *arguments: Any) -> None:
        nonlocal count
        write_begun.release()
        if harm == expected:
            with lock:
                count += 1
            if count >= 30:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        call(*arguments)

    with (
        mock.patch("os.fsync", lambda *arguments: failing("no space to synchronise", fsync, *arguments)),
        mock.patch("os.posix_fadvise", lambda *arguments: failing("no space to write", fadvise, *arguments)),
        share_of_one(folder, reports) as share,
    ):
        if harm == "aborted":
            for _ in range(30):
                assert write_begun.acquire(timeout=60)
            share.abort()
        assert reports.has_come.wait(60)
        assert share.join()
        error = reports.found["error"]
        if harm == "aborted":
            assert "aborted" in error
        else:
            assert f"{folder}/" in error
            assert "No space left on device" in error
        assert open_below(folder) == []

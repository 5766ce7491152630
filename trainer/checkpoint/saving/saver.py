"""The rank's side of background saves: stages its state in shared memory, from which a saving process writes it."""

from __future__ import annotations

import mmap
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from griffin.parallel.world.axes import rank_name
from griffin.trainer.checkpoint.header import Header
from griffin.trainer.checkpoint.plan import SavePlan
from griffin.trainer.checkpoint.saving.coordinator import Target, find_committed
from griffin.trainer.checkpoint.saving.memory import Request, memory_left, shortages
from griffin.trainer.checkpoint.saving.protocol import (
    ROWS,
    FolderCreated,
    Heartbeat,
    Ready,
    SaveFinished,
    SaveRequest,
    Setup,
)

START_SECONDS = 60.0  # to wait for a saving process to start, which takes below one
END_SECONDS = 5.0  # to wait for one to exit before it is killed
PROGRAM = "from griffin.trainer.checkpoint.saving.process import main; main()"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a save."""

    step: int
    path: Path | None  # the checkpoint; None if the save failed
    error: str | None  # None if the checkpoint stands
    warning: str | None = None  # the checkpoint stands, but something else failed
    seconds: float
    bytes: int  # of all ranks' chunks; 0 if not known


@dataclass(kw_only=True)
class _PendingSave:
    """The save in progress."""

    step: int
    started: float
    error: str | None = None  # it failed before the saving processes were told
    inode: int | None = None


class Saver:
    """Saves a training's state in the background. The constructor and `start` are collectives of all ranks.

    Call `wait`, fill `staging`, call `start`, and `poll` from time to time. A failed save does not raise: its Outcome
    has the error, the same on every rank as far as each can know. The next save starts a new process if one was lost.
    """

    staging: np.ndarray  # float32 [3 (master, exp_avg, exp_avg_sq), elements], shared with the saving process

    def __init__(
        self,
        *,
        root: Path,
        plan: SavePlan,
        all_gather: Callable[[Any, Any], list[Any]],
        rank: int,
        world_size: int,
        host: str,
        keep_last: int,
        keep_every: int,
        lock: tuple[Path, str] | None,
        timeout: float = 600.0,
    ):
        """Allocate the staged state and start the saving process.

        Args:
            root: the checkpoints folder.
            all_gather: `Grid.all_gather`.
            host: the name at which other ranks' machines reach this one.
            lock: (path, token) of the run folder's lock; rank 0 commits nothing unless it holds it. None: no check.
            timeout: seconds to wait for another process or for the file system.

        Raises:
            MemoryError: on every rank, where a machine or control group lacks memory for its ranks' staged state.
        """
        self._rank, self._host, self._timeout, self._all_gather = rank, host, timeout, all_gather
        size = max(1, ROWS * plan.elements * 4)
        request = Request(rank=rank, host=host, size=size, left=memory_left())
        answers = all_gather((secrets.token_bytes(32) if rank == 0 else b"", request), tuple[bytes, Request])
        problems = shortages([request for _, request in answers])
        if problems:
            raise MemoryError("; ".join(problems))
        self._memory, mapped = self._allocate(size)
        self.staging = np.frombuffer(mapped, np.float32, count=ROWS * plan.elements).reshape(ROWS, plan.elements)
        target = Target(root=root, arrays=plan.arrays, keep_last=keep_last, keep_every=keep_every, lock=lock)
        setup = Setup(
            rank=rank,
            parent=os.getpid(),
            world_size=world_size,
            host=host,
            key=answers[0][0],
            plan=plan,
            target=target,
            timeout=timeout,
        )
        self._root = root
        self._setup = os.memfd_create("griffin saver setup")
        with open(self._setup, "wb", closefd=False) as file:
            pickle.dump(setup, file)
        self._saves = 0
        self._pending: _PendingSave | None = None
        self._process: subprocess.Popen | None = None
        self._port: int | None = None  # of the process, once it is ready
        self._launch()

    def _allocate(self, size: int) -> tuple[int, mmap.mmap]:
        """Shared memory as a file descriptor and mapped. MemoryError on every rank if it fails on one."""
        memory, error = None, None
        try:
            memory = shared_memory(size)
        except MemoryError as caught:
            error = f"{rank_name(self._rank, self._host)}: {caught}"
        errors = [error for error in self._all_gather(error, str | None) if error is not None]
        if errors:
            if memory is not None:
                os.close(memory[0])
            raise MemoryError("; ".join(errors))
        assert memory is not None
        return memory

    def wait(self) -> Outcome | None:
        """Wait for the save in progress and return its outcome; None if there is none, or `poll` has returned it.

        A saving process that is silent for `timeout` seconds is killed, and the save has failed.
        """
        return self._listen(None)

    def poll(self) -> Outcome | None:
        """The outcome of the save in progress, if it has ended."""
        return self._listen(0)

    def start(self, step: int, header: Header | None) -> None:
        """Start to save the staged state, which must not change until `wait` or `poll` returns the outcome.

        `header` is that of the manifest, given by rank 0.
        """
        assert self._pending is None, "the save before has not been waited for"
        self._pending = _PendingSave(step=step, started=time.monotonic())
        self._saves += 1
        error = self._ensure_ready()
        answers = self._all_gather((self._host, self._port, error), tuple[str, int | None, str | None])
        errors = [error for _, _, error in answers if error is not None]
        if errors:
            self._pending.error = "; ".join(errors)
            return
        addresses = tuple((host, port) for host, port, _ in answers)
        with suppress(OSError):  # it has just died; _listen will find out
            self._control.send(SaveRequest(save=self._saves, step=step, addresses=addresses, header=header))

    def close(self) -> None:
        """End the saving process, also in the middle of a save, which is then lost."""
        self._pending = None
        self._discard(END_SECONDS)

    def _listen(self, seconds: float | None) -> Outcome | None:
        pending = self._pending
        if pending is None:
            return None
        if pending.error is not None:
            return self._end(pending, None, pending.error)
        try:
            while self._control.poll(self._timeout if seconds is None else seconds):
                message = self._control.recv()
                if isinstance(message, FolderCreated):
                    pending.inode = message.inode
                if isinstance(message, FolderCreated | Heartbeat):
                    continue
                assert isinstance(message, SaveFinished), message
                self._pending = None
                if message.is_stuck:
                    self._discard(0)
                return Outcome(
                    step=pending.step,
                    path=Path(message.path) if message.path is not None else None,
                    error=message.error,
                    warning=message.warning,
                    seconds=message.seconds,
                    bytes=message.bytes,
                )
            if seconds is not None:
                return None
            self._discard(0)
            death = f"{self._name} gave no sign of life for {self._timeout:g} s"
        except (EOFError, OSError):
            death = self._discard(END_SECONDS)
        # The process may have been lost after the commit.
        path = find_committed(self._root, pending.step, pending.inode)
        return self._end(pending, path, None if path is not None else death)

    def _end(self, pending: _PendingSave, path: Path | None, error: str | None) -> Outcome:
        self._pending = None
        return Outcome(step=pending.step, path=path, error=error, seconds=time.monotonic() - pending.started, bytes=0)

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        files = (theirs.fileno(), self._memory, self._setup)
        # Import the same modules as this process does; use no threads for linear algebra.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, *map(str, files)],
                env=environment,
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._control = Connection(ours.detach())
        self._port = None

    def _ensure_ready(self) -> str | None:
        """Restart the saving process if it is gone, and wait until it can save. Returns what is wrong, if anything."""
        try:
            if self._process is not None and self._process.poll() is not None:
                self._discard(END_SECONDS)
            if self._process is None:
                self._launch()
            if self._port is None:
                if not self._control.poll(START_SECONDS):
                    self._discard(0)
                    return f"{self._name} was not ready within {START_SECONDS:g} s"
                message = self._control.recv()
                assert isinstance(message, Ready), message
                self._port = message.port
        except EOFError:
            return self._discard(END_SECONDS)
        except OSError as error:
            self._discard(0)
            return f"{self._name} could not be started: {error}"
        return None

    def _discard(self, seconds: float) -> str:
        """Disconnect from the saving process, and kill it if it does not exit in time. Returns how it ended."""
        process, self._process, self._port = self._process, None, None
        if process is None:
            return f"{self._name} is gone"
        self._control.close()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = -signal.SIGKILL
            with suppress(subprocess.TimeoutExpired):  # blocked in a system call
                process.wait(END_SECONDS)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self._name} {how}"

    @property
    def _name(self) -> str:
        return f"the saving process of {rank_name(self._rank, self._host)}"


def shared_memory(size: int) -> tuple[int, mmap.mmap]:
    """An anonymous file in memory, and its mapping. MemoryError if there is not enough memory."""
    try:
        memory = os.memfd_create("griffin staged state")
        os.posix_fallocate(memory, 0, size)
        return memory, mmap.mmap(memory, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except OSError as error:
        raise MemoryError(
            f"no memory for {size / 2**30:.2f} GiB of staged state, which checkpoints are saved from: {error}"
        ) from error

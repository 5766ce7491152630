"""A rank's side of saving: shared memory in which it stages its state, and the process that writes it from there."""

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
from griffin.trainer.checkpoint.plan import SavePlan
from griffin.trainer.checkpoint.saving.coordinator import Target, standing
from griffin.trainer.checkpoint.saving.memory import Request, memory_left, shortages
from griffin.trainer.checkpoint.saving.protocol import ROWS, Alive, Begun, Ended, Order, Ready, Setup

START_SECONDS = 60.0  # patience with a saving process that starts; it takes below one
END_SECONDS = 5.0  # and with one that ends, before it is killed
PROGRAM = "from griffin.trainer.checkpoint.saving.process import main; main()"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a save."""

    step: int
    path: Path | None  # the checkpoint; None if the save failed
    error: str | None  # None if the checkpoint stands
    warning: str | None = None  # it stands, but something else failed
    seconds: float
    bytes: int  # of all ranks' chunks; 0 where they are not known


@dataclass(kw_only=True)
class _Flight:
    """The save under way."""

    step: int
    begun: float
    error: str | None = None  # it failed before it began
    inode: int | None = None


class Saver:
    """Saves a training's state while it goes on. Constructor and `start` are collectives of all ranks.

    Fill `staging` after `wait`, then `start`; ask `poll` now and then. A save that fails does not raise: its Outcome
    says why, the same on every rank as far as each can know, and the next one is tried afresh, with a new process where
    one was lost.
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
        """`root` is the folder of all steps; `host` the name at which other ranks' machines reach this one.

        `all_gather` is that of Grid.

        `lock` is the (path, token) of the run folder's lock, without which rank 0 commits nothing; None for no check.
        `timeout`, in seconds, is that of every wait for another process or a file. MemoryError, on every rank, where
        a machine, or a control group, has no memory for the staged state of all its ranks.
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
        self._flight: _Flight | None = None
        self._process: subprocess.Popen | None = None
        self._port: int | None = None  # of the process, once it is ready
        self._launch()

    def _allocate(self, size: int) -> tuple[int, mmap.mmap]:
        """Shared memory, as a file and mapped. MemoryError on every rank where one gets none."""
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
        """The outcome of the save under way once it has ended; None if there is none, or poll has returned it.

        A saving process that gives no sign of life for `timeout` seconds is killed: the save has failed.
        """
        return self._listen(None)

    def poll(self) -> Outcome | None:
        """The outcome of the save under way if it has ended."""
        return self._listen(0)

    def start(self, step: int, header: dict[str, Any] | None) -> None:
        """Begin to save what is staged, which is not to be changed until `wait` or `poll` return the outcome.

        `header`, of rank 0, holds the manifest's fields but for `arrays` and `files`.
        """
        assert self._flight is None, "the save before has not been waited for"
        self._flight = _Flight(step=step, begun=time.monotonic())
        self._saves += 1
        error = self._ensure_ready()
        answers = self._all_gather((self._host, self._port, error), tuple[str, int | None, str | None])
        errors = [error for _, _, error in answers if error is not None]
        if errors:
            self._flight.error = "; ".join(errors)
            return
        addresses = tuple((host, port) for host, port, _ in answers)
        with suppress(OSError):  # it has just died, as _listen will find
            self._control.send(Order(save=self._saves, step=step, addresses=addresses, header=header))

    def close(self) -> None:
        """End the saving process, also in the middle of a save, which is then lost."""
        self._flight = None
        self._discard(END_SECONDS)

    def _listen(self, seconds: float | None) -> Outcome | None:
        flight = self._flight
        if flight is None:
            return None
        if flight.error is not None:
            return self._end(flight, None, flight.error)
        try:
            while self._control.poll(self._timeout if seconds is None else seconds):
                message = self._control.recv()
                if isinstance(message, Begun):
                    flight.inode = message.inode
                if isinstance(message, Begun | Alive):
                    continue
                assert isinstance(message, Ended), message
                self._flight = None
                if message.is_stuck:
                    self._discard(0)
                return Outcome(
                    step=flight.step,
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
        # The process may have been lost after the checkpoint was committed.
        path = standing(self._root, flight.step, flight.inode)
        return self._end(flight, path, None if path is not None else death)

    def _end(self, flight: _Flight, path: Path | None, error: str | None) -> Outcome:
        self._flight = None
        return Outcome(step=flight.step, path=path, error=error, seconds=time.monotonic() - flight.begun, bytes=0)

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        files = (theirs.fileno(), self._memory, self._setup)
        # The same modules as in this process, however it found them; and no threads for algebra.
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
        """Start the saving process anew if it is gone, and wait until it can save. What is wrong, if anything."""
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
        """Let go of the saving process, killed if it has not ended in time. Says how it ended."""
        process, self._process, self._port = self._process, None, None
        if process is None:
            return f"{self._name} is gone"
        self._control.close()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = -signal.SIGKILL
            with suppress(subprocess.TimeoutExpired):  # in a call to a file system that does not return
                process.wait(END_SECONDS)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self._name} {how}"

    @property
    def _name(self) -> str:
        return f"the saving process of {rank_name(self._rank, self._host)}"


def shared_memory(size: int) -> tuple[int, mmap.mmap]:
    """A file without a name in memory, and all of it mapped. MemoryError if there is not enough."""
    try:
        memory = os.memfd_create("griffin staged state")
        os.posix_fallocate(memory, 0, size)
        return memory, mmap.mmap(memory, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except OSError as error:
        raise MemoryError(
            f"no memory for {size / 2**30:.2f} GiB of staged state, which checkpoints are saved from: {error}"
        ) from error

"""The saving process of one rank: writes the rank's chunks from shared memory while training continues.

Started by `saver.Saver`, with which it shares the staged state; exits when the connection to it ends.
"""

from __future__ import annotations

import mmap
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from griffin.trainer.checkpoint.saving.coordinator import HEARTBEAT_SECONDS, coordinate, describe, find_committed
from griffin.trainer.checkpoint.saving.exchange import CONTROL, Channel, Exchange, Listener
from griffin.trainer.checkpoint.saving.protocol import (
    ROWS,
    FolderCreated,
    Heartbeat,
    Ready,
    SaveFinished,
    SaveRequest,
    Setup,
)
from griffin.trainer.checkpoint.saving.share import Share

NICENESS = 10
POLL_SECONDS = 0.2  # between checks that the rank's process still runs


class SavingProcess:
    """Runs the saves that its rank requests, one at a time."""

    def __init__(self, setup: Setup, staged: np.ndarray, rank: Connection) -> None:
        self._setup, self._staged, self._rank = setup, staged, rank
        self._listener = Listener(setup.host, setup.key, setup.timeout) if setup.world_size > 1 else None
        self._sending = threading.Lock()
        self._is_saving = False

    def run(self) -> None:
        """Serve until the rank exits or closes the connection, then exit at once, even in the middle of a save."""
        try:
            self._rank.send(Ready(port=self._listener.port if self._listener is not None else 0))
            while True:
                # A closed connection is not enough: workers that the rank has forked may hold its end open.
                last_heartbeat, interval = time.monotonic(), min(HEARTBEAT_SECONDS, self._setup.timeout / 4)
                while not self._rank.poll(POLL_SECONDS):
                    if os.getppid() != self._setup.parent:
                        os._exit(0)
                    if self._is_saving and time.monotonic() - last_heartbeat > interval:
                        last_heartbeat = time.monotonic()
                        self._send(Heartbeat())
                request = self._rank.recv()
                self._is_saving = True
                threading.Thread(target=self._save, args=(request,), daemon=True).start()
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # a normal exit waits for the threads of pools, perhaps for ever

    def _save(self, request: SaveRequest) -> None:
        started, setup = time.monotonic(), self._setup
        exchange = Exchange(
            self._listener,
            setup.key,
            save=request.save,
            rank=setup.rank,
            addresses=request.addresses,
            timeout=setup.timeout,
        )
        coordinator: threading.Thread | None = None
        share: Share | None = None
        inode: int | None = None
        control: Channel | None = None
        try:
            if setup.rank == 0:
                assert request.header is not None
                ours, theirs = socket.socketpair()
                control = Channel(ours, exchange.peer(0), setup.timeout)
                other = Channel(theirs, exchange.peer(0), setup.timeout)
                arguments = (
                    setup.target,
                    request.step,
                    request.header,
                    exchange,
                    other,
                    setup.world_size,
                    setup.timeout,
                )
                coordinator = threading.Thread(target=coordinate, args=arguments, daemon=True)
                coordinator.start()
            else:
                control = exchange.connect(0, CONTROL)
            message = control.receive_message()
            if "folder" in message:
                inode = message["inode"]
                self._send(FolderCreated(inode=inode))
                share = Share(setup, self._staged, exchange, Path(message["folder"]), _reporter(control))
                message = control.receive_message()
            while "alive" in message:
                control.send_message(message)
                message = control.receive_message()
            result = message
        except Exception as error:
            path = find_committed(setup.target.root, request.step, inode)
            text = None if path is not None else describe(error)
            result = {"path": None if path is None else str(path), "bytes": 0, "error": text, "warning": None}
        if share is not None:
            share.abort()
        exchange.abort()
        is_done = share is None or share.join()
        if is_done:  # otherwise only the end of this process shows that it writes no longer
            if control is not None:
                control.close()
            if coordinator is not None:
                coordinator.join(setup.timeout)
                is_done = not coordinator.is_alive()
        if is_done:
            exchange.close()
        self._is_saving = False
        with suppress(OSError):  # the rank is gone; this process exits in a moment
            self._send(SaveFinished(**result, seconds=time.monotonic() - started, is_stuck=not is_done))

    def _send(self, message: object) -> None:
        with self._sending:
            self._rank.send(message)


def _reporter(control: Channel) -> Callable[[dict[str, Any]], None]:
    def report(message: dict[str, Any]) -> None:
        with suppress(ConnectionError):  # seen where this connection is read
            control.send_message(message)

    return report


def main() -> None:
    """Run a saving process. Arguments: file descriptors of the connection to the rank, the staged state, the setup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # rank 0's process connects to every other
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rank, memory, setup_file = map(int, sys.argv[1:])
    setup: Setup = pickle.loads(os.pread(setup_file, os.fstat(setup_file).st_size, 0))
    assert isinstance(setup, Setup)
    elements = setup.plan.elements
    staged = np.frombuffer(
        mmap.mmap(memory, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ),
        np.float32,
        count=ROWS * elements,
    ).reshape(ROWS, elements)
    SavingProcess(setup, staged, Connection(rank)).run()

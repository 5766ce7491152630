"""The saving process of one rank: writes its rank's chunks of what is staged while the training goes on.

Started by `saver.Saver`, with which it shares the staged state, and ended by the end of the connection to it.
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

from griffin.trainer.checkpoint.saving.coordinator import SIGN_OF_LIFE_SECONDS, coordinate, describe, standing
from griffin.trainer.checkpoint.saving.exchange import CONTROL, Channel, Exchange, Listener
from griffin.trainer.checkpoint.saving.protocol import ROWS, Alive, Begun, Ended, Order, Ready, Setup
from griffin.trainer.checkpoint.saving.share import Share

NICENESS = 10
GLANCE_SECONDS = 0.2  # between two looks whether the rank's process is there


class SavingProcess:
    """Saves whenever its rank says so."""

    def __init__(self, setup: Setup, staged: np.ndarray, rank: Connection) -> None:
        self._setup, self._staged, self._rank = setup, staged, rank
        self._listener = Listener(setup.host, setup.key, setup.timeout) if setup.world_size > 1 else None
        self._telling = threading.Lock()
        self._is_saving = False

    def run(self) -> None:
        """Until the rank is gone, or has ended the connection: then at once, whatever is being done."""
        try:
            self._rank.send(Ready(port=self._listener.port if self._listener is not None else 0))
            while True:
                # Workers that the rank has forked may hold its end of the connection.
                said, interval = time.monotonic(), min(SIGN_OF_LIFE_SECONDS, self._setup.timeout / 4)
                while not self._rank.poll(GLANCE_SECONDS):
                    if os.getppid() != self._setup.parent:
                        os._exit(0)
                    if self._is_saving and time.monotonic() - said > interval:
                        said = time.monotonic()
                        self._tell(Alive())
                order = self._rank.recv()
                self._is_saving = True
                threading.Thread(target=self._save, args=(order,), daemon=True).start()
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # an exit that waits for the threads of a pool may wait for ever

    def _save(self, order: Order) -> None:
        begun, setup = time.monotonic(), self._setup
        exchange = Exchange(
            self._listener,
            setup.key,
            save=order.save,
            rank=setup.rank,
            addresses=order.addresses,
            timeout=setup.timeout,
        )
        coordinator: threading.Thread | None = None
        share: Share | None = None
        inode: int | None = None
        control: Channel | None = None
        try:
            if setup.rank == 0:
                assert order.header is not None
                ours, theirs = socket.socketpair()
                control = Channel(ours, exchange.peer(0), setup.timeout)
                other = Channel(theirs, exchange.peer(0), setup.timeout)
                arguments = (setup.target, order.step, order.header, exchange, other, setup.world_size, setup.timeout)
                coordinator = threading.Thread(target=coordinate, args=arguments, daemon=True)
                coordinator.start()
            else:
                control = exchange.connect(0, CONTROL)
            message = control.receive_message()
            if "folder" in message:
                inode = message["inode"]
                self._tell(Begun(inode=inode))
                share = Share(setup, self._staged, exchange, Path(message["folder"]), _reporter(control))
                message = control.receive_message()
            while "alive" in message:
                control.send_message(message)
                message = control.receive_message()
            verdict = message
        except Exception as error:
            path = standing(setup.target.root, order.step, inode)
            text = None if path is not None else describe(error)
            verdict = {"path": None if path is None else str(path), "bytes": 0, "error": text, "warning": None}
        if share is not None:
            share.give_up()
        exchange.give_up()
        is_done = share is None or share.join()
        if is_done:  # otherwise the end of this process tells that it writes no longer
            if control is not None:
                control.close()
            if coordinator is not None:
                coordinator.join(setup.timeout)
                is_done = not coordinator.is_alive()
        if is_done:
            exchange.close()
        self._is_saving = False
        with suppress(OSError):  # the rank is gone, and so is this process in a moment
            self._tell(Ended(**verdict, seconds=time.monotonic() - begun, is_stuck=not is_done))

    def _tell(self, message: object) -> None:
        with self._telling:
            self._rank.send(message)


def _reporter(control: Channel) -> Callable[[dict[str, Any]], None]:
    def report(message: dict[str, Any]) -> None:
        with suppress(ConnectionError):  # the save's end is known, or is seen where this connection is read
            control.send_message(message)

    return report


def main() -> None:
    """Arguments: the numbers of the open files that are the connection to the rank, what is staged, and the setup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # rank 0's has a connection to every other
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

"""A pool of rank processes that all multi-rank tests share: importing torch and megatron-core costs seconds each."""

from __future__ import annotations

import copyreg
import importlib
import multiprocessing
import os
import secrets
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from griffin.parallel.world.ranks import LOOPBACK, Ranks, serve_store

SIZE = 4
ROOT = Path(__file__).parents[1]
PRELOAD = ["griffin.trainer.loop"]

# A module travels to the ranks by its name, so that a test may say what to replace there.
copyreg.pickle(ModuleType, lambda module: (importlib.import_module, (module.__name__,)))


class RankError(AssertionError):
    """A rank raised: the message holds its traceback."""


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    os.chdir(ROOT)  # the fork server's folder may be that of a test which is over
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        function, ranks, args, kwargs = job
        try:
            answer = (True, function(ranks, *args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(answer)


class RankPool:
    """Runs `function(ranks, *args)` on ranks 0..n-1 at once and returns their answers in order.

    The function and its arguments must be picklable, and the function importable. A rank that fails or the timeout
    ends all the ranks; the next call starts new ones.
    """

    def __init__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the ranks, which share few cores
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, **kwargs: Any
    ) -> list:
        assert world_size <= SIZE
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        server, key = serve_store(LOOPBACK, 0, None), secrets.token_bytes(32)
        for rank in range(world_size):
            ranks = Ranks(
                rank=rank,
                world_size=world_size,
                local_rank=rank,
                address=LOOPBACK,
                port=server.port,
                source="test",
                store_served=True,
                key=key,
            )
            self._workers[rank][1].send((function, ranks, args, kwargs))
        return self._collect(world_size, timeout)

    def _collect(self, world_size: int, timeout: float) -> list:
        connections = {self._workers[rank][1]: rank for rank in range(world_size)}
        answers: dict[int, Any] = {}
        while connections:
            ready = wait(list(connections), timeout)
            if not ready:
                self.stop()
                raise TimeoutError(f"ranks {sorted(connections.values())} gave no answer within {timeout} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = connections.pop(connection)
                try:
                    ok, answers[rank] = connection.recv()
                except EOFError:
                    ok, answers[rank] = False, "the process died"
                if not ok:
                    # The other ranks may wait for this one; those that failed too tell why within a moment.
                    self.stop()
                    raise RankError(f"rank {rank} of {world_size}:\n{answers[rank]}")
        return [answers[rank] for rank in range(world_size)]

    def stop(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers.clear()

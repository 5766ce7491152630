"""Tasks spread over processes of this machine, or over those that mpiexec started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from griffin.launch.local import cores
from griffin.launch.ranks import mpi_world

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_PER_WORKER = 2  # submitted at once: keeps workers busy, bounds memory


class Workers:
    """`count` processes that run functions of modules on tasks; both travel by pickle.

    `executor` is a concurrent.futures.Executor, or what mpi4py has in its place: then they may be `remote`, on other
    machines, whose files only they themselves can make durable.
    """

    def __init__(self, executor: Any, count: int, *, remote: bool = False) -> None:
        self._executor = executor
        self._count = count
        self.remote = remote

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task], done: Callable[[Result], object]) -> None:
        """Call `done` with each task's result, in the order in which they end.

        The first failure, of a task or of `done`, is raised when no task is under way any more. Raises
        BrokenExecutor where a worker was killed.
        """
        pending: set[Future[Result]] = set()

        def collect() -> None:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                done(future.result())
                pending.remove(future)

        try:
            for task in tasks:
                while len(pending) >= TASKS_PER_WORKER * self._count:
                    collect()
                pending.add(self._executor.submit(function, task))
            while pending:
                collect()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within it, SIGTERM ends this process as an exception does: what is under way is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def start_workers(count: int | None, most: int | None = None) -> Iterator[Workers | None]:
    """`count` workers, or the other ranks where mpiexec started this process with several.

    The default is one per core, but no more than `most`.

    There, rank 0 is given the workers; the others are those workers until rank 0 leaves the context, and are given
    None: nothing is left for them to do. Raises ValueError for a count below 1, or one stated under mpiexec.
    """
    world = _mpi_world()
    if world is not None:
        if count is not None:
            raise ValueError(f"--workers {count}: the workers are the {world.size} ranks of mpiexec; leave it out")
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor(world, root=0) as executor:
            yield None if executor is None else Workers(executor, world.size - 1, remote=True)
        return
    if count is not None and count < 1:
        raise ValueError(f"--workers {count}: must be at least 1")
    count = count or min(cores(), most or cores())
    if count == 1:
        with ended_by_sigterm():
            yield Workers(_InlineExecutor(), 1)
        return
    # Not forked: this process may hold threads.
    context = multiprocessing.get_context("spawn")
    with ended_by_sigterm(), ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker) as pool:
        yield Workers(pool, count)


class _InlineExecutor(Executor):
    """Runs each task in this process, at once."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's, which ends its workers in order
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _mpi_world() -> Any:
    """mpi4py's communicator of the processes that mpiexec started together with this one; None where it is alone."""
    if not any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")):
        return None
    world = mpi_world(os.environ)
    return world if world.size > 1 else None

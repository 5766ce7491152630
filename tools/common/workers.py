"""Run tasks on worker processes of this machine, or on the ranks that mpiexec started."""

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

from griffin.launch.discovery import mpi_world
from griffin.launch.local import cores

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_PER_WORKER = 2  # submitted ahead: keeps workers busy and bounds memory


class Workers:
    """`count` processes that run module-level functions on tasks; functions and tasks are pickled.

    `executor` is a concurrent.futures.Executor or mpi4py's equivalent. Workers of the latter are `remote`: they may be
    on other machines, and must sync the files that they write themselves.
    """

    def __init__(self, executor: Any, count: int, *, remote: bool = False) -> None:
        self._executor = executor
        self._count = count
        self.remote = remote

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task], done: Callable[[Result], object]) -> None:
        """Call `done` with each task's result, in order of completion.

        The first exception of a task or of `done` is raised once no task is running any more. Raises BrokenExecutor
        if a worker was killed.
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
    """Within this context SIGTERM raises SystemExit, so that unfinished output is cleaned up."""
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
    """Start `count` workers (default: one per core, at most `most`), or use the other ranks under mpiexec.

    Under mpiexec rank 0 gets the workers. The other ranks serve as workers until rank 0 leaves the context, and then
    get None: nothing is left for them to do. Raises ValueError for a count below 1, or for any count under mpiexec.
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
    # Not forked: this process may have threads.
    context = multiprocessing.get_context("spawn")
    with ended_by_sigterm(), ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker) as pool:
        yield Workers(pool, count)


class _InlineExecutor(Executor):
    """Runs each task immediately in this process."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers in order
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _mpi_world() -> Any:
    """Return mpi4py's communicator of all ranks that mpiexec started; None if this process is alone."""
    if not any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")):
        return None
    world = mpi_world(os.environ)
    return world if world.size > 1 else None

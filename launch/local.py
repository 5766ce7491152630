"""Ranks as processes of this machine, in the place of torchrun: heavy imports are paid once, no port is guessed."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any

from griffin.launch.discovery import failure_text, leave
from griffin.parallel.world.ranks import HUNG, LOOPBACK, STOPPED, OtherRankError, Ranks, serve_store

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPING = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.1  # how soon a signal is passed on; a rank's end wakes the parent at once
LONGEST_TRACEBACK = 16_000  # characters: what fits a pipe that nobody reads yet


@dataclass(frozen=True)
class Failure:
    rank: int
    exit_code: int  # negative: the signal that ended the rank
    time: float  # of time.monotonic, one clock for all processes
    text: str  # traceback, "" where the rank left none
    is_consequence: bool  # of another rank's failure


def run_local(
    target: Callable[..., None],
    ranks: int,
    args: Sequence[Any] = (),
    *,
    preload: Sequence[str] = (),
    grace_seconds: float = 30.0,
    save_seconds: float = 30.0,
) -> int:
    """Run `target(Ranks, *args)` in `ranks` processes and return the exit code: 0 where all of them returned.

    It is STOPPED where a rank exited with that and none failed: the others are left to end by themselves.

    `target` and `args` travel by pickle. The processes are forked from a server that has imported the modules of
    `preload`, and find each other through a store that this process serves. Must be called from the main thread.

    When a rank fails, the others are killed at once, and the code is the rank's, or 128 + the signal that ended it;
    its traceback goes to stderr. It is HUNG where a rank exited with that. SIGINT, SIGTERM and SIGUSR1 are passed on to
    the ranks. After SIGTERM they have `save_seconds` to save their work and end; after SIGINT, or once one of them has
    failed on the way, `grace_seconds`. A second SIGINT or SIGTERM kills them. None outlives this call or this process.
    """
    context = multiprocessing.get_context("forkserver")
    signals: list[int] = []
    with _environment(ranks), _recorded(signals):
        context.set_forkserver_preload(list(preload))
        with _ignored(FORWARDED):  # inherited: a signal to the whole process group must leave the server alone
            forkserver.ensure_running()
        store = serve_store(LOOPBACK, 0, None)  # imports torch, while the server imports what it preloads
        key = secrets.token_bytes(32)
        group = _Group(grace_seconds, save_seconds)
        try:
            for rank in range(ranks):
                place = Ranks(
                    rank=rank,
                    world_size=ranks,
                    local_rank=rank,
                    address=LOOPBACK,
                    port=store.port,
                    source="local",
                    store_served=True,
                    key=key,
                )
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_run_rank, args=(target, place, tuple(args), writer))
                process.start()
                writer.close()
                group.add(rank, process, reader)
            return group.wait(signals)
        finally:
            group.kill()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Group:
    """The running ranks, watched until all of them have ended."""

    def __init__(self, grace_seconds: float, save_seconds: float) -> None:
        self._grace_seconds, self._save_seconds = grace_seconds, save_seconds
        self._running: dict[int, tuple[ForkServerProcess, connection.Connection]] = {}
        self._world_size = 0
        self._has_stopped = False  # a rank, having saved its work

    def add(self, rank: int, process: ForkServerProcess, failures: connection.Connection) -> None:
        self._running[rank] = (process, failures)
        self._world_size += 1

    def wait(self, signals: list[int]) -> int:
        """Wait for the ranks, passing on `signals` as they are appended; the exit code as `run_local` returns it."""
        failures: list[Failure] = []
        stopping: int | None = None
        allowed, deadline = 0.0, float("inf")
        while self._running:
            connection.wait([process.sentinel for process, _ in self._running.values()], POLL_SECONDS)
            had_failed = bool(failures)
            failures += self._collect()
            while signals:
                number = signals.pop(0)
                self._signal(number)
                if number in STOPPING:
                    allowed = self._save_seconds if number == signal.SIGTERM else self._grace_seconds
                    allowed = allowed if stopping is None else 0.0
                    deadline = time.monotonic() + allowed
                    stopping = number
            if failures and not had_failed:  # without that rank, nothing can be saved any more
                allowed = 0.0 if stopping is None else self._grace_seconds
                deadline = min(deadline, time.monotonic() + allowed)
            if self._running and time.monotonic() >= deadline:
                self.kill()
                if not failures and stopping is not None:
                    when = f"{allowed:g} s after" if allowed else "before a second signal,"
                    _say(f"ranks had not ended {when} {_name(stopping)}: killed")
                    return 128 + stopping
        return self._report(failures, stopping)

    def kill(self) -> None:
        """End every running rank, with the processes that it started."""
        for process, _ in self._running.values():
            process.kill()
            _kill_group(process)
        for process, failures in self._running.values():
            process.join()
            failures.close()
        self._running.clear()

    def _collect(self) -> list[Failure]:
        """Forget the ranks that have ended, and return those that failed."""
        failures = []
        for rank, (process, pipe) in list(self._running.items()):
            code = process.exitcode
            if code is None:
                continue
            del self._running[rank]
            _kill_group(process)
            if code == STOPPED:
                self._has_stopped = True
            elif code != 0:
                failures.append(Failure(rank, code, *_receive(pipe)))
            pipe.close()
        return failures

    def _signal(self, number: int) -> None:
        for process, _ in self._running.values():
            if process.exitcode is None:
                assert process.pid is not None
                os.kill(process.pid, number)

    def _report(self, failures: list[Failure], stopping: int | None) -> int:
        """Say what went wrong first: the failures of other ranks are mostly lost connections to it."""
        if not failures:
            return STOPPED if self._has_stopped else 0
        # A rank that was killed or crashed leaves no traceback and is noticed late: it counts as first.
        # One that says of all that they hang knows best.
        first = min(failures, key=lambda f: (f.exit_code != HUNG, f.is_consequence, f.text != "", f.time))
        code = first.exit_code if first.exit_code > 0 else 128 - first.exit_code
        if code == HUNG:  # the rank has reported, and others may be stopped: they have been killed
            _say(f"the ranks hung (exit code {HUNG})")
        elif stopping is not None and code == 128 + stopping:
            _say(f"stopped by {_name(stopping)}")
        else:
            how = f"exit code {code}" if first.exit_code > 0 else f"killed by {_name(-first.exit_code)}"
            _say(f"rank {first.rank} of {self._world_size} failed ({how})\n{first.text}".rstrip())
        return code


def _run_rank(
    target: Callable[..., None], ranks: Ranks, args: tuple[Any, ...], failures: connection.Connection
) -> None:
    """What a rank's process does."""
    os.setpgid(0, 0)  # a Ctrl-C reaches the ranks once, by way of the parent
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a notice: what does not handle it goes on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        target(ranks, *args)
        return
    except SystemExit:
        raise
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException as error:
        text = failure_text(error)[-LONGEST_TRACEBACK:]
        failures.send((time.monotonic(), text, isinstance(error, OtherRankError)))
        code = 1
    leave(code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _kill_group(process: ForkServerProcess) -> None:
    """End what a rank started, data loaders for instance."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it started nothing, or is so new that it leads no group yet
        os.killpg(process.pid, signal.SIGKILL)


def _receive(pipe: connection.Connection) -> tuple[float, str, bool]:
    """When a rank failed, its traceback and whether another one's failure caused it; now and "" where it cannot say."""
    try:
        return pipe.recv()
    except EOFError:
        return time.monotonic(), "", False


def _name(number: int) -> str:
    return signal.Signals(number).name


def _say(text: str) -> None:
    print(f"griffin: {text}", file=sys.stderr, flush=True)


@contextmanager
def _recorded(signals: list[int]) -> Iterator[None]:
    """Append signals to a list instead of acting on them."""
    previous = {number: signal.signal(number, lambda got, _: signals.append(got)) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _ignored(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _environment(ranks: int) -> Iterator[None]:
    """What ranks inherit: their share of the cores, and a way to count GPUs that does not start CUDA before a fork."""
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cores() // ranks)),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)

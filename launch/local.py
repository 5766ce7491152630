"""Ranks as processes of this machine. Unlike torchrun, heavy imports run once, and no port is guessed."""

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
POLL_SECONDS = 0.1  # delay until a signal is forwarded; a rank's exit wakes the parent at once
MAX_TRACEBACK = 16_000  # characters; fits the buffer of a pipe that nobody reads yet


@dataclass(frozen=True)
class Failure:
    rank: int
    exit_code: int  # negative: the signal that killed the rank
    time: float  # of time.monotonic, the same clock for all processes
    text: str  # traceback; "" if the rank left none
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
    """Run `target(Ranks, *args)` in `ranks` processes, and return the exit code: 0 if all of them returned.

    The code is STOPPED if a rank exited with STOPPED and none failed; the other ranks then end by themselves.

    `target` and `args` are pickled. The processes are forked from a server that has imported the modules in `preload`,
    and rendezvous through a store that this process serves. Call it from the main thread.

    When a rank fails, the others are killed at once and its traceback is printed to stderr. The code is then the
    rank's, or 128 + the signal that killed it, and HUNG if any rank exited with HUNG. SIGINT, SIGTERM and SIGUSR1 are
    forwarded to the ranks. After SIGTERM they have `save_seconds` to save and exit; after SIGINT, or once one of them
    has failed meanwhile, `grace_seconds`. A second SIGINT or SIGTERM kills them. No rank outlives this call or this
    process.
    """
    context = multiprocessing.get_context("forkserver")
    signals: list[int] = []
    with _environment(ranks), _recorded(signals):
        context.set_forkserver_preload(list(preload))
        with _ignored(FORWARDED):  # inherited by the server, which a signal to the process group must not end
            forkserver.ensure_running()
        store = serve_store(LOOPBACK, 0, None)  # imports torch while the server preloads modules
        key = secrets.token_bytes(32)
        group = _RankProcesses(grace_seconds, save_seconds)
        try:
            for rank in range(ranks):
                rank_info = Ranks(
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
                process = context.Process(target=_run_rank, args=(target, rank_info, tuple(args), writer))
                process.start()
                writer.close()
                group.add(rank, process, reader)
            return group.wait(signals)
        finally:
            group.kill()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _RankProcesses:
    """Processes of the running ranks, supervised until all of them have ended."""

    def __init__(self, grace_seconds: float, save_seconds: float) -> None:
        self._grace_seconds, self._save_seconds = grace_seconds, save_seconds
        self._running: dict[int, tuple[ForkServerProcess, connection.Connection]] = {}
        self._world_size = 0
        self._has_stopped = False  # whether a rank exited with STOPPED

    def add(self, rank: int, process: ForkServerProcess, failures: connection.Connection) -> None:
        self._running[rank] = (process, failures)
        self._world_size += 1

    def wait(self, signals: list[int]) -> int:
        """Wait for the ranks, forwarding `signals` as they arrive, and return the exit code of `run_local`."""
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
            if failures and not had_failed:  # without that rank nothing can be saved
                allowed = 0.0 if stopping is None else self._grace_seconds
                deadline = min(deadline, time.monotonic() + allowed)
            if self._running and time.monotonic() >= deadline:
                self.kill()
                if not failures and stopping is not None:
                    when = f"{allowed:g} s after" if allowed else "before a second signal,"
                    _log(f"ranks had not ended {when} {_signal_name(stopping)}: killed")
                    return 128 + stopping
        return self._report(failures, stopping)

    def kill(self) -> None:
        """Kill every running rank and the processes that it started."""
        for process, _ in self._running.values():
            process.kill()
            _kill_group(process)
        for process, failures in self._running.values():
            process.join()
            failures.close()
        self._running.clear()

    def _collect(self) -> list[Failure]:
        """Remove the ranks that have ended, and return the failures among them."""
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
        """Print the first failure and return its exit code. Later failures are mostly lost connections to that rank."""
        if not failures:
            return STOPPED if self._has_stopped else 0
        # A rank that was killed or crashed leaves no traceback and is noticed late, so it counts as first. A rank that
        # reports a hang of all ranks takes precedence.
        first = min(failures, key=lambda f: (f.exit_code != HUNG, f.is_consequence, f.text != "", f.time))
        code = first.exit_code if first.exit_code > 0 else 128 - first.exit_code
        if code == HUNG:  # the rank has reported; others, which may be suspended, have been killed
            _log(f"the ranks hung (exit code {HUNG})")
        elif stopping is not None and code == 128 + stopping:
            _log(f"stopped by {_signal_name(stopping)}")
        else:
            how = f"exit code {code}" if first.exit_code > 0 else f"killed by {_signal_name(-first.exit_code)}"
            _log(f"rank {first.rank} of {self._world_size} failed ({how})\n{first.text}".rstrip())
        return code


def _run_rank(
    target: Callable[..., None], ranks: Ranks, args: tuple[Any, ...], failures: connection.Connection
) -> None:
    """Main function of a rank's process."""
    os.setpgid(0, 0)  # Ctrl-C reaches the ranks only once, through the parent
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to save: ignored until handled
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        target(ranks, *args)
        return
    except SystemExit:
        raise
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException as error:
        text = failure_text(error)[-MAX_TRACEBACK:]
        failures.send((time.monotonic(), text, isinstance(error, OtherRankError)))
        code = 1
    leave(code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _kill_group(process: ForkServerProcess) -> None:
    """Kill the processes that a rank started, such as data loaders."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it started none, or does not lead a group yet
        os.killpg(process.pid, signal.SIGKILL)


def _receive(pipe: connection.Connection) -> tuple[float, str, bool]:
    """Return time, traceback and `is_consequence` of a failure; the current time and "" if the rank sent nothing."""
    try:
        return pipe.recv()
    except EOFError:
        return time.monotonic(), "", False


def _signal_name(number: int) -> str:
    return signal.Signals(number).name


def _log(text: str) -> None:
    print(f"griffin: {text}", file=sys.stderr, flush=True)


@contextmanager
def _recorded(signals: list[int]) -> Iterator[None]:
    """Context in which signals are appended to a list."""
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
    """Context that sets what ranks inherit: their share of the cores, and counting GPUs without initialising CUDA."""
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

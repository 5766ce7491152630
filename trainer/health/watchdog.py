"""The watchdog: ends a run that hangs, with a report of the ranks that keep it waiting.

Each rank has two threads beside its main thread. The store thread has its own connection to the rendezvous store.
Every few seconds it writes a heartbeat, reads the heartbeat of the next rank, and checks whether a rank has raised the
alarm. These are a few requests per rank, however many ranks there are. The clock thread checks time limits. It never
waits for the store, so that it also notices a store that does not answer.

A rank raises the alarm if its main thread stays too long in one watched phase, or if the next rank has sent no
heartbeat for so long. Then every rank writes its stacks. The rank that raised the alarm collects the states of all
ranks and names those that lag, and all ranks exit with HUNG. Every wait on this path has a time limit, and a file that
cannot be written is left out. Messages are signed: an alarm from outside the run is ignored.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from griffin.parallel.world.grid import Grid
from griffin.parallel.world.messages import ForgedError, seal, unseal
from griffin.parallel.world.ranks import HUNG, Ranks
from griffin.trainer.health.hang_report import SilentRank, compose_report
from griffin.trainer.health.rank_state import (
    RankState,
    communication,
    describe_entries,
    describe_memory,
    last_collectives,
    main_frames,
    recorded,
    where,
)
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.log_file import LogFile
from griffin.trainer.run.step_name import step_name

if TYPE_CHECKING:
    from torch.distributed import TCPStore

T = TypeVar("T")

FIRST = 3.0  # the first phase of each kind may take so many times as long: it compiles kernels and opens connections
# Time limits once the alarm is raised.
STORE_SECONDS = 3.0  # for a request to the store
DISK_SECONDS = 3.0  # for writing a file
GATHER_SECONDS = 5.0  # for the answers of all ranks
ANSWER_SECONDS = GATHER_SECONDS + 3 * DISK_SECONDS  # for the report
LAST_SECONDS = 30.0  # after which a process that runs no Python code any more is ended from C


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """The phase that the main thread is in."""

    entered: int  # number of watched phases entered so far
    name: str
    step: int
    since: float  # time.monotonic
    limit: float  # seconds; infinite outside of watched phases


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """The rank that raised the alarm, and its step."""

    rank: int
    step: int


def communication_timeout(hang_seconds: float) -> timedelta:
    """Timeout of collectives. It is later than the watchdog, whose report says more."""
    return max(timedelta(minutes=30), timedelta(seconds=(FIRST + 1) * hang_seconds))


class Watchdog:
    """Watches the main threads of all ranks. A context manager, created on all ranks; `hang_seconds` 0 is off.

    Only code within `watching` has a time limit. Elsewhere a rank must send heartbeats, but may take any time.
    `on_report` is called in a thread by the rank that reports a hang, before the process exits.
    """

    def __init__(
        self,
        hang_seconds: float,
        ranks: Ranks,
        grid: Grid,
        folder: RunFolder,
        on_report: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_report = on_report
        self._hang_seconds, self._ranks, self._device, self._folder = hang_seconds, ranks, grid.device, folder
        self._run_key = grid.key
        self._interval = min(max(hang_seconds / 20, 0.2), 10.0)  # seconds between heartbeats
        self._tick = min(self._interval, 1.0)  # seconds between checks for an alarm
        self._host = socket.gethostname()
        self._prefix = f"griffin/watchdog/{folder.attempt}"  # the store may outlive an attempt
        self._phase = _Phase(entered=0, name="the start", step=0, since=time.monotonic(), limit=float("inf"))
        self._kinds: set[str] = set()  # of phases that have ended once
        self._heard = time.monotonic()  # when the store last answered
        self._beats = 0  # heartbeats sent
        self._alarm: str | None = None  # the reason for an alarm, if this rank's store thread has found one
        self._closing = threading.Event()
        self._hung = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        if self._hang_seconds > 0:
            self._heard = time.monotonic()
            for target in (self._watch_store, self._watch_clock):
                name = target.__name__.replace("_watch_", "watchdog ")
                thread = threading.Thread(target=target, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._hung.is_set():  # the process is about to exit; its report says more than this rank's error
            time.sleep(LAST_SECONDS)
        for thread in self._threads:
            thread.join(STORE_SECONDS)

    @contextmanager
    def watching(self, kind: str, step: int) -> Iterator[None]:
        """Limit the time of the code within: the phase `kind` (such as "step") of `step`, in this rank's main thread.

        All ranks enter the same phases in the same order. The first of each kind may take FIRST times as long.
        """
        limit = self._hang_seconds * (1.0 if kind in self._kinds else FIRST) or float("inf")
        entered = self._phase.entered + 1
        self._enter(_Phase(entered=entered, name=f"{kind} {step}", step=step, since=0, limit=limit))
        try:
            yield
        finally:
            phase = self._phase
            name = f"what follows {phase.name}"
            self._enter(_Phase(entered=phase.entered, name=name, step=step, since=0, limit=float("inf")))
        self._kinds.add(kind)

    def progress(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`; the time limit of the phase restarts with each."""
        for item in items:
            self._enter(self._phase)
            yield item

    def _enter(self, phase: _Phase) -> None:
        self._phase = _Phase(**vars(phase) | {"since": time.monotonic()})
        if phase.limit < float("inf"):
            # This works without the interpreter's lock, which a call that hangs may hold. It writes to stderr, since a
            # file would have to be opened now, and exits with 1.
            faulthandler.dump_traceback_later(phase.limit + LAST_SECONDS, file=2, exit=True)
        elif self._hang_seconds > 0:
            faulthandler.cancel_dump_traceback_later()

    def _watch_store(self) -> None:
        """The store thread. It reconnects after a lost connection: without heartbeats this rank would count as hung."""
        while True:
            with suppress(Exception):  # if the server is gone, ranks end by themselves, or the clock thread notices
                self._exchange_heartbeats(self._connect())
            if self._closing.wait(self._tick):
                return

    def _exchange_heartbeats(self, store: TCPStore) -> None:
        """Write and read heartbeats until the watchdog closes. Raises if the connection is lost."""
        own_key, next_key = self._key("alive", self._ranks.rank), self._key("alive", self._next)
        alarm = self._key("alarm")
        last, changed, due = b"", time.monotonic(), 0.0
        while not self._closing.wait(self._tick):
            if store.check([alarm]) and self._read(alarm, store.get(alarm), Alarm):
                self._alarm = "another rank has raised the alarm"
            now = time.monotonic()
            if now >= due:
                self._beats, due = self._beats + 1, now + self._interval
                self._put(store, own_key, (self._beats, time.time(), self._state(quick=True)))
                found = store.get(next_key) if store.check([next_key]) else b""
                if found != last or found == b"ended":
                    last, changed = found, time.monotonic()
                elif time.monotonic() - changed > self._hang_seconds:
                    self._alarm = f"rank {self._next} has sent no sign of life for {self._hang_seconds:g} s"
            self._heard = time.monotonic()
        store.set(own_key, "ended")

    def _watch_clock(self) -> None:
        """The clock thread."""
        while not self._closing.wait(min(self._tick, 0.5)):
            phase, now = self._phase, time.monotonic()
            reason = self._alarm
            if now - phase.since > phase.limit:
                reason = f"{phase.name} has taken more than {phase.limit:g} s on rank {self._ranks.rank}"
            elif min(now - self._heard, now - phase.since) > self._hang_seconds:
                reason = f"{self._ranks.server_name()} has not answered for {self._hang_seconds:g} s"
            if reason is not None:
                self._hung.set()
                self._end(reason)

    def _end(self, reason: str) -> NoReturn:
        """Raise the alarm, unless another rank has; write this rank's stacks, report, and exit with HUNG."""
        try:
            entries = _within(DISK_SECONDS, lambda: recorded(self._device)) or []
            state = self._state(quick=False, collectives=last_collectives(entries))
            proposal = Alarm(rank=self._ranks.rank, step=self._phase.step)
            store = _within(STORE_SECONDS, self._connect)
            alarm = None
            if store is not None:
                alarm = _within(STORE_SECONDS, lambda: self._raise(store, proposal))
            step = alarm.step if alarm else self._phase.step
            folder = self._folder.hangs / f"{step_name(step)}-attempt-{self._folder.attempt}"
            stacks = folder / f"rank-{self._ranks.rank:05}.txt"
            raised_by_other = alarm is not None and alarm.rank != self._ranks.rank
            if store is not None and raised_by_other:  # before writing to the disk, which may be slow
                _within(STORE_SECONDS, lambda: self._put(store, self._key("state", state.rank), state))
            _within(DISK_SECONDS, lambda: self._write_stacks(stacks, state, describe_entries(entries)))
            if store is None or alarm is None:
                self._report_alone(folder, state, reason)
            elif raised_by_other:
                _within(ANSWER_SECONDS, lambda: self._await_report(store))
            else:
                _within(ANSWER_SECONDS, lambda: self._collect(store, state, folder, reason))
        finally:
            os._exit(HUNG)

    def _await_report(self, store: TCPStore) -> None:
        """Tell that this rank has written its stacks. Wait for the report: launchers end all ranks if one exits."""
        store.add(self._key("answers"), 1)
        while not store.check([self._key("reported")]):
            time.sleep(0.2)

    def _collect(self, store: TCPStore, state: RankState, folder: Path, reason: str) -> None:
        """Wait for the states and stack files of the other ranks, and write the report."""
        deadline = time.monotonic() + GATHER_SECONDS
        while store.add(self._key("answers"), 0) < self._ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        states, silent = {state.rank: state}, []
        for rank in range(self._ranks.world_size):
            if rank == state.rank:
                continue
            key = self._key("state", rank)
            answer = self._read(key, store.get(key), RankState) if store.check([key]) else None
            if answer is not None:
                states[rank] = answer
            else:
                silent.append(self._last_heartbeat(store, rank))
        head, report = compose_report(states, silent, reason=reason)
        self._publish(folder, head, report)
        store.set(self._key("reported"), "")
        time.sleep(0.5)  # so that the others have exited by themselves when a launcher sees that this rank has

    def _last_heartbeat(self, store: TCPStore, rank: int) -> SilentRank:
        key = self._key("alive", rank)
        heartbeat = self._read(key, store.get(key), tuple[int, float, RankState]) if store.check([key]) else None
        if heartbeat is None:  # never sent, or its watchdog has ended
            return SilentRank(rank=rank)
        _, sent, state = heartbeat
        return SilentRank(rank=rank, last=state, seconds=max(0.0, time.time() - sent))

    def _report_alone(self, folder: Path, state: RankState, reason: str) -> None:
        """Report when the store does not answer: each rank for itself; the first one writes the report file."""
        server = self._ranks.server_name()
        lines = [
            f"HANG: {reason}",
            f"{server} does not answer: the process that serves it is stopped or dead, or its machine cannot be "
            "reached. The states of other ranks are unknown.",
            f"{state.name}: for {state.seconds:.0f} s in {state.phase}, {state.communication or 'no communication'}",
        ]
        text = "\n".join(lines)
        self._publish(folder, text, text + "\n")

    def _publish(self, folder: Path, summary: str, report: str) -> None:
        """Write the report file, and the summary to stderr and console.log."""
        text = f"{summary}\nStacks of all ranks: {folder}\nThe run ends with exit code {HUNG}."
        _within(DISK_SECONDS, lambda: os.write(2, f"griffin: {text}\n".encode()))

        def write() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "report.txt").open("x", encoding="utf-8") as file:
                    file.write(report)
            except FileExistsError:  # another rank has written it
                return
            except OSError:
                pass
            self._on_report()

        _within(DISK_SECONDS, write)
        _within(DISK_SECONDS, lambda: LogFile(self._folder.console, lambda _: None).write(f"{text}\n"))

    def _write_stacks(self, path: Path, state: RankState, collectives: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(
                f"{state.name}\nFor {state.seconds:.0f} s in {state.phase}\n"
                f"Communication: {state.communication or 'none'}\nAt: {state.where}\n"
                f"Device memory: {_within(1.0, lambda: describe_memory(self._device)) or 'the device does not answer'}"
                f"\n\nLast collectives, oldest first:\n{collectives}\n\nStacks, innermost call first:\n"
            )
            file.flush()
            faulthandler.dump_traceback(file)

    def _state(self, *, quick: bool, collectives: tuple = ()) -> RankState:
        phase = self._phase
        frames = [] if quick else main_frames()
        return RankState(
            rank=self._ranks.rank,
            host=self._host,
            pid=os.getpid(),
            entered=phase.entered,
            phase=phase.name,
            seconds=time.monotonic() - phase.since,
            where=where(frames),
            communication=communication(frames),
            collectives=collectives,
        )

    def _connect(self) -> TCPStore:
        return self._ranks.another_connection(timedelta(seconds=60))

    def _raise(self, store: TCPStore, proposal: Alarm) -> Alarm:
        """Raise `proposal` unless another rank has raised the alarm before. Returns the alarm that counts."""
        name, standing = self._key("alarm"), b""
        sealed = seal(self._run_key, name, proposal)
        while True:  # replace what is not from a rank of this run
            found = store.compare_set(name, standing, sealed)  # type: ignore[arg-type]  # it takes bytes as well
            if alarm := self._read(name, found, Alarm):
                return alarm
            standing = found

    def _put(self, store: TCPStore, name: str, value: object) -> None:
        store.set(name, seal(self._run_key, name, value))  # type: ignore[arg-type]  # it takes bytes as well

    def _read(self, name: str, sealed: bytes, kind: Any) -> Any:
        """The value that a rank of this run has put under `name`; None if it is from anybody else."""
        with suppress(ForgedError):
            return unseal(self._run_key, name, sealed, kind)
        return None

    @property
    def _next(self) -> int:
        return (self._ranks.rank + 1) % self._ranks.world_size

    def _key(self, *parts: object) -> str:
        return "/".join((self._prefix, *map(str, parts)))


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """The result of `work`; None if it raises or takes longer than `seconds`. It is then left running."""
    results: list[T] = []

    def run() -> None:
        with suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None

"""Ends a run that hangs, with a report of which ranks keep it waiting.

Each rank has two threads beside its main one. One talks to the rendezvous store, over a connection of its own: every
few seconds it writes a sign of life, looks at that of the next rank and at whether somebody has raised the alarm. That
is the same few requests per rank however many ranks there are. The other looks at the clock. It never waits for the
store, so that a store that does not answer is noticed too.

A rank raises the alarm when its main thread stays in one watched phase for too long, or when the next rank has given no
sign of life for so long. Then every rank writes its stacks, the one that raised the alarm collects what all say of
themselves and names those that lag, and all leave with HUNG. Every wait in this has an end, and what cannot be written
is left out. What ranks say is signed: an alarm of anybody else is none.
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
from griffin.trainer.health.hang_report import Silent, compose
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

FIRST = 3.0  # times as long may the first phase of each kind take: it compiles kernels and opens connections
# Seconds, of what happens once the alarm is raised.
STORE_SECONDS = 3.0  # for the store to answer
DISK_SECONDS = 3.0  # for a file to be written
GATHER_SECONDS = 5.0  # for the ranks to answer
ANSWER_SECONDS = GATHER_SECONDS + 3 * DISK_SECONDS  # for the report to be written
LAST_SECONDS = 30.0  # after which a process in which no Python runs any more is ended from C


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """What the main thread does."""

    entered: int  # watched phases so far
    phase: str
    step: int
    since: float  # of time.monotonic
    limit: float  # seconds; infinite outside of watched phases


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Who has raised it, and in which step."""

    rank: int
    step: int


def communication_timeout(hang_seconds: float) -> timedelta:
    """After which a collective fails by itself: later than the watchdog, which has more to say."""
    return max(timedelta(minutes=30), timedelta(seconds=(FIRST + 1) * hang_seconds))


class Watchdog:
    """Watches the main threads of all ranks. A context manager, made on all ranks alike; `hang_seconds` 0 is off.

    Only what is done within `watching` is bounded in time. Elsewhere a rank is expected to give signs of life, no more.
    `on_report` is called by the rank that reports a hang, in a thread, before the process ends.
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
        self._interval = min(max(hang_seconds / 20, 0.2), 10.0)  # seconds between two signs of life
        self._tick = min(self._interval, 1.0)  # and between two looks at the alarm
        self._host = socket.gethostname()
        self._prefix = f"griffin/watchdog/{folder.attempt}"  # a store may outlive an attempt
        self._mark = _Mark(entered=0, phase="the start", step=0, since=time.monotonic(), limit=float("inf"))
        self._kinds: set[str] = set()  # of phases that have been gone through
        self._heard = time.monotonic()  # when the store last answered
        self._beats = 0  # signs of life given
        self._alarm: str | None = None  # why, where this rank's store thread finds a reason
        self._closing = threading.Event()
        self._hung = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        if self._hang_seconds > 0:
            self._heard = time.monotonic()
            for target in (self._talk, self._look):
                thread = threading.Thread(target=target, name=f"watchdog {target.__name__[1:]}", daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._hung.is_set():  # the process is about to leave, with a better word than this rank's
            time.sleep(LAST_SECONDS)
        for thread in self._threads:
            thread.join(STORE_SECONDS)

    @contextmanager
    def watching(self, kind: str, step: int) -> Iterator[None]:
        """While in it, this rank's main thread is at `kind` ("step", say) `step`, which must not take too long.

        All ranks enter the same phases in the same order. The first of each kind may take FIRST times as long.
        """
        limit = self._hang_seconds * (1.0 if kind in self._kinds else FIRST) or float("inf")
        mark = self._mark
        self._set(_Mark(entered=mark.entered + 1, phase=f"{kind} {step}", step=step, since=0, limit=limit))
        try:
            yield
        finally:
            mark = self._mark
            self._set(
                _Mark(entered=mark.entered, phase=f"what follows {mark.phase}", step=step, since=0, limit=float("inf"))
            )
        self._kinds.add(kind)

    def progress(self, items: Iterable[T]) -> Iterator[T]:
        """Pass items on; whenever one is asked for, the phase's time begins anew."""
        for item in items:
            self._set(self._mark)
            yield item

    def _set(self, mark: _Mark) -> None:
        self._mark = _Mark(**vars(mark) | {"since": time.monotonic()})
        if mark.limit < float("inf"):
            # Runs without the interpreter's lock, which a call that hangs may hold; into stderr, as any file would have
            # to be opened now. The exit code is 1.
            faulthandler.dump_traceback_later(mark.limit + LAST_SECONDS, file=2, exit=True)
        elif self._hang_seconds > 0:
            faulthandler.cancel_dump_traceback_later()

    def _talk(self) -> None:
        """The thread of the store. A connection that is lost is made anew, as long as the server is there: without it
        this rank would be taken for one that hangs."""
        while True:
            with suppress(Exception):  # where the server is gone, ranks end by themselves, or `_look` finds out
                self._talk_to(self._connect())
            if self._closing.wait(self._tick):
                return

    def _talk_to(self, store: TCPStore) -> None:
        """Until the watchdog closes; raises where the connection is lost."""
        own, others = self._key("alive", self._ranks.rank), self._key("alive", self._next)
        alarm = self._key("alarm")
        theirs, changed, due = b"", time.monotonic(), 0.0
        while not self._closing.wait(self._tick):
            if store.check([alarm]) and self._read(alarm, store.get(alarm), Alarm):
                self._alarm = "another rank has raised the alarm"
            now = time.monotonic()
            if now >= due:
                self._beats, due = self._beats + 1, now + self._interval
                self._put(store, own, (self._beats, time.time(), self._state(quick=True)))
                found = store.get(others) if store.check([others]) else b""
                if found != theirs or found == b"ended":
                    theirs, changed = found, time.monotonic()
                elif time.monotonic() - changed > self._hang_seconds:
                    self._alarm = f"rank {self._next} has given no sign of life for {self._hang_seconds:g} s"
            self._heard = time.monotonic()
        store.set(own, "ended")

    def _look(self) -> None:
        """The thread of the clock."""
        while not self._closing.wait(min(self._tick, 0.5)):
            mark, now = self._mark, time.monotonic()
            reason = self._alarm
            if now - mark.since > mark.limit:
                reason = f"{mark.phase} has taken more than {mark.limit:g} s on rank {self._ranks.rank}"
            elif min(now - self._heard, now - mark.since) > self._hang_seconds:
                reason = f"{self._ranks.server_name()} has not answered for {self._hang_seconds:g} s"
            if reason is not None:
                self._hung.set()
                self._end(reason)

    def _end(self, reason: str) -> NoReturn:
        try:
            entries = _within(DISK_SECONDS, lambda: recorded(self._device)) or []
            state = self._state(quick=False, collectives=last_collectives(entries))
            proposal = Alarm(rank=self._ranks.rank, step=self._mark.step)
            store = _within(STORE_SECONDS, self._connect)
            alarm = None
            if store is not None:
                alarm = _within(STORE_SECONDS, lambda: self._raise(store, proposal))
            step = alarm.step if alarm else self._mark.step
            folder = self._folder.hangs / f"{step_name(step)}-attempt-{self._folder.attempt}"
            stacks = folder / f"rank-{self._ranks.rank:05}.txt"
            is_asked = alarm is not None and alarm.rank != self._ranks.rank
            if store is not None and is_asked:  # before the disk, which may be slow
                _within(STORE_SECONDS, lambda: self._put(store, self._key("state", state.rank), state))
            _within(DISK_SECONDS, lambda: self._write_own(stacks, state, describe_entries(entries)))
            if store is None or alarm is None:
                self._end_alone(folder, state, reason)
            elif is_asked:
                _within(ANSWER_SECONDS, lambda: self._await_report(store))
            else:
                _within(ANSWER_SECONDS, lambda: self._collect(store, state, folder, reason))
        finally:
            os._exit(HUNG)

    def _await_report(self, store: TCPStore) -> None:
        """Tell that this rank has written its file, and stay until the report is: a launcher ends all if one leaves."""
        store.add(self._key("answers"), 1)
        while not store.check([self._key("reported")]):
            time.sleep(0.2)

    def _collect(self, store: TCPStore, state: RankState, folder: Path, reason: str) -> None:
        """Wait for what the other ranks say, and for their files, and report."""
        deadline = time.monotonic() + GATHER_SECONDS
        while store.add(self._key("answers"), 0) < self._ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        states, silent = {state.rank: state}, []
        for rank in range(self._ranks.world_size):
            if rank == state.rank:
                continue
            key = self._key("state", rank)
            said = self._read(key, store.get(key), RankState) if store.check([key]) else None
            if said is not None:
                states[rank] = said
            else:
                silent.append(self._last_sign(store, rank))
        head, report = compose(states, silent, reason=reason)
        self._publish(folder, head, report)
        store.set(self._key("reported"), "")
        time.sleep(0.5)  # so that the others have left by themselves when a launcher sees that this rank has

    def _last_sign(self, store: TCPStore, rank: int) -> Silent:
        key = self._key("alive", rank)
        sign = self._read(key, store.get(key), tuple[int, float, RankState]) if store.check([key]) else None
        if sign is None:  # or its watchdog has ended
            return Silent(rank=rank)
        _, said, state = sign
        return Silent(rank=rank, last=state, seconds=max(0.0, time.time() - said))

    def _end_alone(self, folder: Path, state: RankState, reason: str) -> None:
        """Where the store does not answer: each rank speaks for itself, and the first writes the report."""
        server = self._ranks.server_name()
        lines = [
            f"HANG: {reason}",
            f"{server} does not answer: the process that serves it is stopped or dead, or its machine cannot be "
            "reached. Other ranks cannot be asked.",
            f"{state.name}: for {state.seconds:.0f} s in {state.phase}, {state.communication or 'no communication'}",
        ]
        text = "\n".join(lines)
        self._publish(folder, text, text + "\n")

    def _publish(self, folder: Path, head: str, report: str) -> None:
        place = f"{head}\nStacks of all ranks: {folder}\nThe run ends with exit code {HUNG}."
        _within(DISK_SECONDS, lambda: os.write(2, f"griffin: {place}\n".encode()))

        def write() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "report.txt").open("x", encoding="utf-8") as file:
                    file.write(report)
            except FileExistsError:  # another rank has
                return
            except OSError:  # what is called now may fare better
                pass
            self._on_report()

        _within(DISK_SECONDS, write)
        _within(DISK_SECONDS, lambda: LogFile(self._folder.console, lambda _: None).write(f"{place}\n"))

    def _write_own(self, path: Path, state: RankState, collectives: str) -> None:
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
        mark = self._mark
        frames = [] if quick else main_frames()
        return RankState(
            rank=self._ranks.rank,
            host=self._host,
            pid=os.getpid(),
            entered=mark.entered,
            phase=mark.phase,
            seconds=time.monotonic() - mark.since,
            where=where(frames),
            communication=communication(frames),
            collectives=collectives,
        )

    def _connect(self) -> TCPStore:
        return self._ranks.another_connection(timedelta(seconds=60))

    def _raise(self, store: TCPStore, proposal: Alarm) -> Alarm:
        """The alarm that stands: this rank's, where no rank has raised one before."""
        name, standing = self._key("alarm"), b""
        sealed = seal(self._run_key, name, proposal)
        while True:  # until it is in the place of what a stranger has put there
            found = store.compare_set(name, standing, sealed)  # type: ignore[arg-type]  # it takes bytes as well
            if alarm := self._read(name, found, Alarm):
                return alarm
            standing = found

    def _put(self, store: TCPStore, name: str, value: object) -> None:
        store.set(name, seal(self._run_key, name, value))  # type: ignore[arg-type]  # it takes bytes as well

    def _read(self, name: str, sealed: bytes, kind: Any) -> Any:
        """What a rank has put there; None where it was none."""
        with suppress(ForgedError):
            return unseal(self._run_key, name, sealed, kind)
        return None

    @property
    def _next(self) -> int:
        return (self._ranks.rank + 1) % self._ranks.world_size

    def _key(self, *parts: object) -> str:
        return "/".join((self._prefix, *map(str, parts)))


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """The result of `work`; None where it raises, or has not ended after so long, and is left behind."""
    results: list[T] = []

    def run() -> None:
        with suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None

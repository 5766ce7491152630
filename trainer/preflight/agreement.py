"""Agreement of all ranks through the store, within a time limit, which a rank that hangs cannot block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from griffin.parallel.world.axes import rank_name, rank_names
from griffin.parallel.world.grid import Grid
from griffin.parallel.world.messages import ForgedError
from griffin.parallel.world.ranks import RunError

T = TypeVar("T")
R = TypeVar("R")

POLL_SECONDS = 0.005
GRACE_SECONDS = 5.0  # beyond the limit, for rank 0 to name late ranks, and for the others to read about a failure
HEARING_SECONDS = 0.5  # in which ranks that wait for a key of rank 0 read it


class PreflightError(RunError):
    """Checks have failed. The same on every rank. `lines` are the results of checks that passed."""

    def __init__(self, failures: Sequence[str], warnings: Sequence[str] = (), lines: Sequence[str] = ()) -> None:
        super().__init__(tuple(failures), tuple(warnings), tuple(lines))
        self.failures, self.warnings, self.lines = tuple(failures), tuple(warnings), tuple(lines)

    def __str__(self) -> str:
        count = len(self.failures)
        return f"{count} check{'s' * (count > 1)} before the first step failed:\n" + "\n".join(
            f"- {text}" for text in self.failures
        )


@dataclass(frozen=True, kw_only=True)
class _Failed:
    """A PreflightError, as rank 0 sends it to the others."""

    failures: tuple[str, ...]
    warnings: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RankLocation:
    """The host of a rank."""

    rank: int
    local_rank: int
    host: str

    def __str__(self) -> str:
        return rank_name(self.rank, self.host)


class Agreement:
    """Gathers values of all ranks on rank 0, and sends its answer to all. All calls together may take `seconds`."""

    def __init__(self, grid: Grid, location: RankLocation, seconds: float) -> None:
        self._grid, self._store, self._location, self._world_size = grid, grid.store, location, grid.world_size
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._hosts: dict[int, str] = {}  # on rank 0: of the ranks that have answered

    @property
    def deadline(self) -> float:
        """The end of the time limit, in time.monotonic."""
        return self._deadline

    def agree(
        self,
        name: str,
        value: T,
        kind: Any,
        decide: Callable[[list[T]], R],
        answer_kind: Any,
        failures_of: Callable[[T], Iterable[str]] | None = None,
    ) -> R:
        """Gather the values of all ranks, call `decide` with them on rank 0, and return its answer on every rank.

        Values are read as `kind`, the answer as `answer_kind` (see `parallel.world.messages`). `name` says what ranks
        have been doing, and is used once.

        Raises PreflightError on every rank if `decide` does, if ranks are late, or if a message is not from a rank of
        the run. For late ranks it names them, with the failures (`failures_of`) that the others have found.
        """
        key = f"griffin/preflight/{name}"
        if self._location.rank != 0:
            self._grid.put(f"{key}/{self._location.rank}", (self._location.host, value))
            self._store.add(f"{key}/count", 1)
            return self._answer(name, key, answer_kind)
        try:
            answer = decide(self._collect(name, key, value, kind, failures_of))
        except BaseException as error:
            sent = error if isinstance(error, PreflightError) else PreflightError([f"rank 0 failed at {name}: {error}"])
            self._grid.put(key, (_Failed(failures=sent.failures, warnings=sent.warnings, lines=sent.lines), None))
            # Rank 0 may serve the store: it waits until the others have read this.
            self._wait_for_count(f"{key}/heard", time.monotonic() + GRACE_SECONDS, self._store.add(f"{key}/count", 0))
            raise
        self._grid.put(key, (None, answer))
        return answer

    def leave(self) -> None:
        """After a failure, wait until rank 0 has called this too: a launcher ends all ranks when one exits."""
        key = "griffin/preflight/parting"
        if self._location.rank == 0:
            self._store.set(key, "")
            time.sleep(HEARING_SECONDS)  # rank 0 may serve the store
        else:
            with suppress(dist.DistError):  # rank 0 hangs or has exited
                self._store.wait([key], timedelta(seconds=2 * GRACE_SECONDS))

    def _get(self, key: str, kind: Any) -> Any:
        try:
            return self._grid.get(key, kind)
        except ForgedError as error:
            raise PreflightError([str(error)]) from None

    def _answer(self, name: str, key: str, kind: Any) -> Any:
        left = max(0.0, self._deadline - time.monotonic()) + GRACE_SECONDS
        try:
            self._store.wait([key], timedelta(seconds=left))
        except dist.DistStoreError:
            raise PreflightError([f"rank 0 was not done with {name} within {self._seconds:g} s"]) from None
        failed, answer = self._get(key, tuple[_Failed, None] | tuple[None, kind])
        if failed is not None:
            self._store.add(f"{key}/heard", 1)
            raise PreflightError(failed.failures, failed.warnings, failed.lines)
        return answer

    def _collect(
        self, name: str, key: str, value: T, kind: Any, failures_of: Callable[[T], Iterable[str]] | None
    ) -> list[T]:
        others = range(1, self._world_size)
        complete = self._wait_for_count(f"{key}/count", self._deadline, len(others))
        keys = {rank: f"{key}/{rank}" for rank in others if complete or self._store.check([f"{key}/{rank}"])}
        values = {0: value}
        self._hosts[0] = self._location.host
        for rank in keys:
            self._hosts[rank], values[rank] = self._get(keys[rank], tuple[str, kind])
        if complete:
            return [values[rank] for rank in range(self._world_size)]
        late = rank_names([rank for rank in others if rank not in keys], self._hosts)
        failures = [text for value in values.values() for text in failures_of(value)] if failures_of else []
        raise PreflightError([f"{late}: not done with {name} within {self._seconds:g} s", *failures])

    def _wait_for_count(self, key: str, deadline: float, count: int) -> bool:
        """Wait for a counter of the store. Returns whether it has reached `count` by the deadline."""
        while self._store.add(key, 0) < count:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

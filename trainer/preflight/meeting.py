"""How ranks agree without a collective, which one that hangs would hold up: through the store, within a time limit."""

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
GRACE_SECONDS = 5.0  # beyond the limit, for rank 0 to name who was late, and for the others to hear of a failure
HEARING_SECONDS = 0.5  # in which ranks that wait for a word of rank 0 hear it


class PreflightError(RunError):
    """Checks failed: the same on every rank. `lines` tell what was found to be well, `warnings` what was odd."""

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
    """A PreflightError as it travels."""

    failures: tuple[str, ...]
    warnings: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    rank: int
    local_rank: int
    host: str

    def __str__(self) -> str:
        return rank_name(self.rank, self.host)


class Meeting:
    """All ranks of a grid, which have `seconds` from now for everything that they agree on here."""

    def __init__(self, grid: Grid, place: Place, seconds: float) -> None:
        self._grid, self._store, self._place, self._world_size = grid, grid.store, place, grid.world_size
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._hosts: dict[int, str] = {}  # of ranks that have been heard of, on rank 0

    @property
    def deadline(self) -> float:
        """Of time.monotonic."""
        return self._deadline

    def agree(
        self,
        name: str,
        value: T,
        kind: Any,
        judge: Callable[[list[T]], R],
        answer_kind: Any,
        complaints: Callable[[T], Iterable[str]] | None = None,
    ) -> R:
        """What rank 0's `judge` makes of all ranks' values, on every rank. `name` is what the ranks have been doing.

        Raises PreflightError everywhere where `judge` raises it, or where ranks are late: it names them, with the
        complaints of those that are there. Values are read as `kind`, the answer as `answer_kind` (see
        `parallel.world.messages`); a name is used once. What no rank has written is a failure too.
        """
        key = f"griffin/preflight/{name}"
        if self._place.rank != 0:
            self._grid.put(f"{key}/{self._place.rank}", (self._place.host, value))
            self._store.add(f"{key}/count", 1)
            return self._answer(name, key, answer_kind)
        try:
            answer = judge(self._collect(name, key, value, kind, complaints))
        except BaseException as error:
            told = error if isinstance(error, PreflightError) else PreflightError([f"rank 0 failed at {name}: {error}"])
            self._grid.put(key, (_Failed(failures=told.failures, warnings=told.warnings, lines=told.lines), None))
            # Rank 0 may serve the store: it stays until the others have heard.
            self._wait_for_count(f"{key}/heard", time.monotonic() + GRACE_SECONDS, self._store.add(f"{key}/count", 0))
            raise
        self._grid.put(key, (None, answer))
        return answer

    def part(self) -> None:
        """After a failure, the others stay until rank 0 has called this: a launcher ends all ranks when one leaves."""
        key = "griffin/preflight/parting"
        if self._place.rank == 0:
            self._store.set(key, "")
            time.sleep(HEARING_SECONDS)  # it may serve the store
        else:
            with suppress(dist.DistError):  # rank 0 hangs, or is gone
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
        self, name: str, key: str, value: T, kind: Any, complaints: Callable[[T], Iterable[str]] | None
    ) -> list[T]:
        others = range(1, self._world_size)
        complete = self._wait_for_count(f"{key}/count", self._deadline, len(others))
        keys = {rank: f"{key}/{rank}" for rank in others if complete or self._store.check([f"{key}/{rank}"])}
        values = {0: value}
        self._hosts[0] = self._place.host
        for rank in keys:
            self._hosts[rank], values[rank] = self._get(keys[rank], tuple[str, kind])
        if complete:
            return [values[rank] for rank in range(self._world_size)]
        late = rank_names([rank for rank in others if rank not in keys], self._hosts)
        said = [text for value in values.values() for text in complaints(value)] if complaints else []
        raise PreflightError([f"{late}: not done with {name} within {self._seconds:g} s", *said])

    def _wait_for_count(self, key: str, deadline: float, count: int) -> bool:
        """Whether the counter has come to `count` by the deadline."""
        while self._store.add(key, 0) < count:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

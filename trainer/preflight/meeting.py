"""How ranks agree without a collective, which one that hangs would hold up: through the store, within a time limit."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any, TypeVar

import torch.distributed as dist

from griffin.parallel.grid import Grid

T = TypeVar("T")
R = TypeVar("R")

POLL_SECONDS = 0.005
GRACE_SECONDS = 5.0  # beyond the limit, for rank 0 to name who was late, and for the others to hear of a failure
HEARING_SECONDS = 0.5  # in which ranks that wait for a word of rank 0 hear it
NAMED_HOSTS = 8  # of which a message lists the ranks


class PreflightError(RuntimeError):
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
class Place:
    rank: int
    local_rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Meeting:
    """All ranks of a grid, which have `seconds` from now for everything that they agree on here."""

    def __init__(self, grid: Grid, place: Place, seconds: float) -> None:
        self._store, self._place, self._world_size = grid.store, place, grid.world_size
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._hosts: dict[int, str] = {}  # of ranks that have been heard of, on rank 0

    @property
    def deadline(self) -> float:
        """Of time.monotonic."""
        return self._deadline

    def agree(
        self, name: str, value: T, judge: Callable[[list[T]], R], complaints: Callable[[T], Iterable[str]] | None = None
    ) -> R:
        """What rank 0's `judge` makes of all ranks' values, on every rank. `name` is what the ranks have been doing.

        Raises PreflightError everywhere where `judge` raises it, or where ranks are late: it names them, with the
        complaints of those that are there. Values and answer travel by pickle; a name is used once.
        """
        key = f"griffin/preflight/{name}"
        if self._place.rank != 0:
            self._put(f"{key}/{self._place.rank}", (self._place.host, value))
            self._store.add(f"{key}/count", 1)
            return self._answer(name, key)
        try:
            answer = judge(self._collect(name, key, value, complaints))
        except BaseException as error:
            told = error if isinstance(error, PreflightError) else PreflightError([f"rank 0 failed at {name}: {error}"])
            self._put(key, told)
            # Rank 0 may serve the store: it stays until the others have heard.
            self._wait_for_count(f"{key}/heard", time.monotonic() + GRACE_SECONDS, self._store.add(f"{key}/count", 0))
            raise
        self._put(key, answer)
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

    def _put(self, key: str, value: object) -> None:
        self._store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes as well

    def _answer(self, name: str, key: str) -> Any:
        left = max(0.0, self._deadline - time.monotonic()) + GRACE_SECONDS
        try:
            self._store.wait([key], timedelta(seconds=left))
        except dist.DistStoreError:
            raise PreflightError([f"rank 0 was not done with {name} within {self._seconds:g} s"]) from None
        answer = pickle.loads(self._store.get(key))
        if isinstance(answer, PreflightError):
            self._store.add(f"{key}/heard", 1)
            raise answer
        return answer

    def _collect(self, name: str, key: str, value: T, complaints: Callable[[T], Iterable[str]] | None) -> list[T]:
        others = range(1, self._world_size)
        complete = self._wait_for_count(f"{key}/count", self._deadline, len(others))
        keys = {rank: f"{key}/{rank}" for rank in others if complete or self._store.check([f"{key}/{rank}"])}
        values = {0: value}
        self._hosts[0] = self._place.host
        if keys:
            for rank, text in zip(keys, self._store.multi_get(list(keys.values())), strict=True):
                self._hosts[rank], values[rank] = pickle.loads(text)
        if complete:
            return [values[rank] for rank in range(self._world_size)]
        late = name_ranks([rank for rank in others if rank not in keys], self._hosts)
        said = [text for value in values.values() for text in complaints(value)] if complaints else []
        raise PreflightError([f"{late}: not done with {name} within {self._seconds:g} s", *said])

    def _wait_for_count(self, key: str, deadline: float, count: int) -> bool:
        """Whether the counter has come to `count` by the deadline."""
        while self._store.add(key, 0) < count:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True


def name_ranks(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """ "rank 3 on n0", "ranks 0-7 on n0; ranks 8, 10 on n1": by host, which is left out where it is not known."""
    named: dict[str | None, list[int]] = {}
    for rank in sorted(ranks):
        named.setdefault(hosts.get(rank), []).append(rank)
    texts = []
    for host, mine in list(named.items())[:NAMED_HOSTS]:
        where = "" if host is None else f" on {host}"
        texts.append(f"rank{'s' * (len(mine) > 1)} {_spans(mine)}{where}")
    if len(named) > NAMED_HOSTS:
        rest = sum(len(mine) for mine in list(named.values())[NAMED_HOSTS:])
        texts.append(f"{rest} ranks of {len(named) - NAMED_HOSTS} more hosts")
    return "; ".join(texts)


def _spans(ranks: Sequence[int]) -> str:
    """ "0-7, 9" for sorted numbers."""
    spans = []
    for _, group in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        spans.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 2 else ", ".join(map(str, numbers)))
    return ", ".join(spans)

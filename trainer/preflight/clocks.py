"""Clock differences between hosts: rank 0 asks each host for its time through the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from griffin.parallel.world.grid import Grid

REQUESTS = 3  # per host; the fastest answer counts
PATIENCE_SECONDS = 5.0  # for an answer; the next agreement of all ranks names a rank that gives none


def now() -> float:
    return time.time()


def measure_skews(grid: Grid, rank: int, leaders: Sequence[int], deadline: float) -> dict[int, float]:
    """On rank 0, the seconds by which the clock of each of `leaders` is ahead of its own; {} on other ranks.

    The error is below half of the time that an answer takes. `leaders` are ranks other than 0, one per host;
    `deadline` is in time.monotonic.
    """
    store, skews = grid.store, dict[int, float]()
    if rank in leaders:
        for number in range(REQUESTS):
            if not _wait(store, f"{_key(rank, number)}/asked", deadline - time.monotonic()):
                break
            grid.put(f"{_key(rank, number)}/time", now())
    if rank == 0:
        for leader in leaders:
            fastest = float("inf")
            for number in range(REQUESTS):
                asked = now()
                store.set(f"{_key(leader, number)}/asked", "1")
                if not _wait(store, f"{_key(leader, number)}/time", PATIENCE_SECONDS):
                    break
                theirs, heard = grid.get(f"{_key(leader, number)}/time", float), now()
                if heard - asked < fastest:
                    fastest, skews[leader] = heard - asked, theirs - (asked + heard) / 2
    return skews


def _key(rank: int, number: int) -> str:
    return f"griffin/preflight/clocks/{rank}/{number}"


def _wait(store: dist.Store, key: str, seconds: float) -> bool:
    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.001)))
    except dist.DistStoreError:
        return False
    return True

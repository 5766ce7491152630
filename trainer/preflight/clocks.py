"""How far the hosts' clocks are apart: rank 0 asks each for its time through the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from griffin.parallel.world.grid import Grid

ASKED = 3  # times, of which the fastest answer counts
PATIENCE_SECONDS = 5.0  # for an answer; a rank that gives none is named where ranks meet next


def now() -> float:
    return time.time()


def measure_skews(grid: Grid, rank: int, leaders: Sequence[int], deadline: float) -> dict[int, float]:
    """Seconds by which the clock of each of `leaders` is ahead of rank 0's, on rank 0; {} on the others.

    The error is below half of the time that an answer takes. `leaders` are ranks other than 0, one of each host;
    `deadline` is of time.monotonic.
    """
    store, skews = grid.store, dict[int, float]()
    if rank in leaders:
        for number in range(ASKED):
            if not _wait(store, f"{_key(rank, number)}/asked", deadline - time.monotonic()):
                break
            grid.put(f"{_key(rank, number)}/time", now())
    if rank == 0:
        for leader in leaders:
            fastest = float("inf")
            for number in range(ASKED):
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

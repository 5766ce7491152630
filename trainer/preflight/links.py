"""Speed and correctness of communication: between pairs of neighbours, then in an all-reduce over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from griffin.parallel.world.grid import Grid

Pair = tuple[int, int]
REPEATS = 4  # the best counts, after a first one that connects


@dataclass(frozen=True, kw_only=True)
class Link:
    """The measured link of two ranks, which send to each other at the same time."""

    pair: Pair
    seconds: float  # for the exchange of a few bytes
    bandwidth: float  # bytes per second in each direction


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """The exchanges of a rank: links of which it is the first rank, and the failures it has found."""

    links: tuple[Link, ...] = ()
    failures: tuple[str, ...] = ()


def ring_rounds(size: int) -> list[list[Pair]]:
    """Pairs of neighbours on a ring of `size`, in rounds in which each member takes part at most once."""
    pairs = [(index, index + 1) for index in range(size - 1)] + [(size - 1, 0)] * (size > 2)
    even = size - size % 2  # the pair that closes a ring of odd length has a round of its own
    rounds = [pairs[0:even:2], pairs[1:even:2], pairs[even:]]
    return [pairs for pairs in rounds if pairs]


def link_rounds(hosts: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Pairs of ranks to measure, in at most six rounds; `hosts` are the ranks of each host.

    They form a ring within each host, and rings over hosts of the first, second, ... rank of each.
    """
    within: list[list[Pair]] = [[], [], []]
    for ranks in hosts:
        for number, pairs in enumerate(ring_rounds(len(ranks))):
            within[number] += [(ranks[a], ranks[b]) for a, b in pairs]
    between = [
        [pair for a, b in pairs for pair in zip(hosts[a], hosts[b], strict=False)] for pairs in ring_rounds(len(hosts))
    ]
    return [pairs for pairs in (*within, *between) if pairs]


def measure_links(grid: Grid, rounds: Sequence[Sequence[Pair]], deadline: float) -> Exchanges:
    """Measure this rank's links in all rounds, until one fails. `deadline` is in time.monotonic."""
    links: list[Link] = []
    failures: list[str] = []
    count = 2**24 if grid.device.type == "cuda" else 2**17  # float32
    for pair in (pair for pairs in rounds for pair in pairs if grid.rank in pair):
        peer = pair[0] if pair[1] == grid.rank else pair[1]
        task = f"rank {grid.rank} exchanging data with rank {peer}"
        try:
            seconds, _ = exchange(grid, peer, 2, deadline)
            long_seconds, is_correct = exchange(grid, peer, count, deadline)
        except (RuntimeError, TimeoutError) as error:
            failures.append(f"{task}: {_first_line(error)}")
            break
        if not is_correct:
            failures.append(f"{task}: other values arrived than were sent")
        if grid.rank == pair[0]:
            links.append(Link(pair=pair, seconds=seconds, bandwidth=4 * count / long_seconds))
    return Exchanges(links=tuple(links), failures=tuple(failures))


def exchange(grid: Grid, peer: int, count: int, deadline: float) -> tuple[float, bool]:
    """Seconds of the fastest exchange of `count` float32 with `peer`, and whether the received values are correct."""
    sent, received = pattern(grid.rank, count, grid.device), torch.empty(count, device=grid.device)

    def work() -> list[Any]:
        # The same order on both ranks, which backends without tags require.
        ends = [(dist.isend, sent), (dist.irecv, received)]
        return dist.batch_isend_irecv([dist.P2POp(end, tensor, peer) for end, tensor in ends])

    seconds = best_of(grid.device, work, deadline)
    return seconds, torch.equal(received, pattern(peer, count, grid.device))


def pattern(rank: int, count: int, device: torch.device) -> Tensor:
    """Small integers that depend on rank and index, float32 [count]. Their sum over ranks is exact."""
    return torch.arange(count, device=device).remainder_(5).add_(rank % 8).float()


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """The measured all-reduce of a rank, and the failures it has found."""

    bytes: int
    seconds: float
    failures: tuple[str, ...] = ()


def measure_all_reduce(grid: Grid, deadline: float) -> AllReduce:
    """Measure an all-reduce over all ranks, and check every element. `deadline` is in time.monotonic."""
    count = 2**24 if grid.device.type == "cuda" else 2**16
    expected = pattern(0, count, grid.device) * grid.world_size + sum(rank % 8 for rank in range(grid.world_size))
    mine, total = pattern(grid.rank, count, grid.device), torch.empty(count, device=grid.device)

    def work() -> list[Any]:
        total.copy_(mine)
        return [all_reduce(total)]

    def failed(text: str) -> AllReduce:
        return AllReduce(bytes=0, seconds=0.0, failures=(f"all-reduce on rank {grid.rank}: {text}",))

    try:
        seconds = best_of(grid.device, work, deadline)
    except (RuntimeError, TimeoutError) as error:
        return failed(_first_line(error))
    wrong = (total != expected).nonzero()
    if len(wrong):
        first = int(wrong[0])
        return failed(
            f"{len(wrong)} of {count} sums are wrong, first [{first}]: {float(total[first]):g}, must be "
            f"{float(expected[first]):g}"
        )
    return AllReduce(bytes=4 * count, seconds=seconds)


def all_reduce(tensor: Tensor) -> Any:
    return dist.all_reduce(tensor, async_op=True)


def best_of(device: torch.device, work: Callable[[], list[Any]], deadline: float) -> float:
    """The shortest of some times that `work` and its completion take. TimeoutError after `deadline`."""
    best = float("inf")
    for number in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        _finish(device, work(), deadline)
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def _finish(device: torch.device, works: Sequence[Any], deadline: float) -> None:
    left = deadline - time.monotonic()
    if device.type != "cuda":
        for work in works:
            work.wait(timedelta(seconds=max(left, 0.001)))
        return
    for work in works:
        work.wait()  # the stream waits, not this process
    done = torch.cuda.Event()
    done.record()
    while not done.query():
        if time.monotonic() >= deadline:
            raise TimeoutError("did not end within the time limit")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]

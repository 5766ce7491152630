"""The checks of all ranks before the first step: a run that starts on sick hardware is lost hours later."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from griffin.parallel.world.grid import Grid
from griffin.parallel.world.ranks import Ranks
from griffin.trainer.preflight.clocks import measure_skews
from griffin.trainer.preflight.folder import meeting_place, unseen, visit
from griffin.trainer.preflight.judge import Judge
from griffin.trainer.preflight.links import AllReduce, Exchanges, link_rounds, measure_all_reduce, measure_links
from griffin.trainer.preflight.machine import Machine, Rates, describe_machine, measure_rates
from griffin.trainer.preflight.meeting import Meeting, Place, PreflightError
from griffin.trainer.settings.sections import Config

LIMIT_SECONDS = 60.0
REPORTING_SECONDS = 3.0  # of them, for a rank whose exchange with another hangs to say so


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was found, the same on every rank."""

    seconds: float
    lines: tuple[str, ...]  # "CHECK: what was found"
    warnings: tuple[str, ...]


def preflight(
    config: Config | None,
    ranks: Ranks,
    grid: Grid,
    run_dir: Path,
    say: Callable[[str], object],
    *,
    limit: float = LIMIT_SECONDS,
) -> Preflight:
    """Check versions, settings, devices, links, run folder and clocks of all ranks; a collective of all of them.

    Where `config` is None, its settings and the size of its checkpoints are not checked. What is odd, such as a slow
    link, is said by rank 0 and not fatal. Nothing is left in `run_dir`.

    Raises PreflightError, the same on every rank, where ranks differ in what must agree, a device or an exchange of
    data is not right, the folder is not shared or has no room for a checkpoint, or a rank has not done its part within
    `limit` seconds; it names ranks and hosts.
    """
    begun = time.monotonic()
    place = Place(rank=ranks.rank, local_rank=ranks.local_rank, host=host_name())
    meeting = Meeting(grid, place, limit)
    judge = Judge(config, grid, run_dir)
    dtype = torch.float32 if config is None else getattr(torch, config.train.dtype)
    try:
        with ExitStack() as stack:
            hosts = _check_machines(config, grid, run_dir, place, meeting, judge, dtype, stack)
        if grid.world_size > 1:
            _check_links(grid, hosts, meeting, judge)
    except PreflightError as error:
        _report(error.lines, error.warnings, time.monotonic() - begun, say)
        meeting.part()
        raise

    def conclude(_: list[None]) -> Preflight:
        seconds = time.monotonic() - begun
        return Preflight(seconds=seconds, lines=tuple(judge.lines), warnings=tuple(judge.warnings))

    found = meeting.agree("the end", None, None, conclude, Preflight)
    _report(found.lines, found.warnings, found.seconds, say)
    return found


def host_name() -> str:
    return socket.gethostname()


def _check_machines(
    config: Config | None,
    grid: Grid,
    run_dir: Path,
    place: Place,
    meeting: Meeting,
    judge: Judge,
    dtype: torch.dtype,
    stack: ExitStack,
) -> list[list[int]]:
    """What needs no exchange of data. The ranks of each host."""

    def begin(places: list[Place]) -> tuple[list[Place], Path]:
        judge.arrived(places)
        try:
            return places, stack.enter_context(meeting_place(run_dir))
        except OSError as error:
            path = run_dir.absolute()
            raise PreflightError([f"{place.host} (rank 0) cannot write in {path}: {error.strerror}"]) from None

    places, folder = meeting.agree("arriving", place, Place, begin, tuple[list[Place], Path])
    leaders = [other.rank for other in places if other.local_rank == 0 and other.rank != 0]
    skews = measure_skews(grid, place.rank, leaders, meeting.deadline)
    seen = visit(folder, place.rank) if place.rank in leaders else None

    def see(machines: list[Machine]) -> frozenset[int]:
        visitors = [rank for rank in leaders if machines[rank].folder == ""]
        return judge.saw(machines, unseen(folder, visitors), skews)

    machine = describe_machine(config, grid.device, dtype, seen)
    again = meeting.agree("checking its machine and device", machine, Machine, see, frozenset[int])

    def rate(rates: list[Rates | None]) -> None:
        judge.measured_again(rates)
        judge.rated()

    rates = measure_rates(grid.device, dtype) if place.rank in again else None
    meeting.agree("measuring its device", rates, Rates | None, rate, None)
    hosts: dict[str, list[int]] = {}
    for other in places:
        hosts.setdefault(other.host, []).append(other.rank)
    return list(hosts.values())


def _check_links(grid: Grid, hosts: list[list[int]], meeting: Meeting, judge: Judge) -> None:
    deadline = meeting.deadline - REPORTING_SECONDS
    rounds = link_rounds(hosts)
    for name in ("exchanging data with its neighbours", "doing so again"):  # an outlier is named after a second look
        exchanges = measure_links(grid, rounds, deadline)
        if not meeting.agree(name, exchanges, Exchanges, judge.exchanged, bool, lambda each: each.complaints):
            break
    meeting.agree(
        "an all-reduce",
        measure_all_reduce(grid, deadline),
        AllReduce,
        judge.reduced,
        None,
        lambda each: each.complaints,
    )


def _report(lines: tuple[str, ...], warnings: tuple[str, ...], seconds: float, say: Callable[[str], object]) -> None:
    if lines:
        say("\n".join([f"Preflight, {seconds:.1f} s:", *(f"  {line}" for line in lines)]))
    for text in warnings:
        say(f"PREFLIGHT WARNING: {text}")

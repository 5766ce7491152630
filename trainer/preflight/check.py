"""Preflight: checks of all ranks before the first step, since a run on faulty hardware fails hours later."""

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
from griffin.trainer.preflight.agreement import Agreement, PreflightError, RankLocation
from griffin.trainer.preflight.assessment import Assessment
from griffin.trainer.preflight.clocks import measure_skews
from griffin.trainer.preflight.folder import probe, probe_folder, unseen
from griffin.trainer.preflight.links import AllReduce, Exchanges, link_rounds, measure_all_reduce, measure_links
from griffin.trainer.preflight.machine import Machine, Rates, describe_machine, measure_rates
from griffin.trainer.settings.sections import Config

LIMIT_SECONDS = 60.0
REPORTING_SECONDS = 3.0  # of these, time for a rank whose exchange with another hangs to report it


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The result, the same on every rank."""

    seconds: float
    lines: tuple[str, ...]  # "CHECK: result"
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
    """Check versions, settings, devices, links, run folder and clocks of all ranks. A collective of all ranks.

    If `config` is None, settings and the size of checkpoints are not checked. Rank 0 prints warnings, such as a slow
    link, which are not fatal. Nothing is left in `run_dir`.

    Raises PreflightError, the same on every rank, if ranks disagree where they must agree, a device or an exchange of
    data gives wrong results, the run folder is not shared or has no room for a checkpoint, or a rank does not answer
    within `limit` seconds. It names ranks and hosts.
    """
    start = time.monotonic()
    location = RankLocation(rank=ranks.rank, local_rank=ranks.local_rank, host=host_name())
    agreement = Agreement(grid, location, limit)
    assessment = Assessment(config, grid, run_dir)
    dtype = torch.float32 if config is None else getattr(torch, config.train.dtype)
    try:
        with ExitStack() as stack:
            hosts = _check_machines(config, grid, run_dir, location, agreement, assessment, dtype, stack)
        if grid.world_size > 1:
            _check_links(grid, hosts, agreement, assessment)
    except PreflightError as error:
        _report(error.lines, error.warnings, time.monotonic() - start, say)
        agreement.leave()
        raise

    def conclude(_: list[None]) -> Preflight:
        seconds = time.monotonic() - start
        return Preflight(seconds=seconds, lines=tuple(assessment.lines), warnings=tuple(assessment.warnings))

    result = agreement.agree("the end", None, None, conclude, Preflight)
    _report(result.lines, result.warnings, result.seconds, say)
    return result


def host_name() -> str:
    return socket.gethostname()


def _check_machines(
    config: Config | None,
    grid: Grid,
    run_dir: Path,
    location: RankLocation,
    agreement: Agreement,
    assessment: Assessment,
    dtype: torch.dtype,
    stack: ExitStack,
) -> list[list[int]]:
    """Run the checks that exchange no data between devices. Returns the ranks of each host."""

    def start(locations: list[RankLocation]) -> tuple[list[RankLocation], Path]:
        assessment.add_ranks(locations)
        try:
            return locations, stack.enter_context(probe_folder(run_dir))
        except OSError as error:
            path = run_dir.absolute()
            raise PreflightError([f"{location.host} (rank 0) cannot write in {path}: {error.strerror}"]) from None

    locations, folder = agreement.agree("arriving", location, RankLocation, start, tuple[list[RankLocation], Path])
    leaders = [other.rank for other in locations if other.local_rank == 0 and other.rank != 0]
    skews = measure_skews(grid, location.rank, leaders, agreement.deadline)
    problem = probe(folder, location.rank) if location.rank in leaders else None

    def assess_machines(machines: list[Machine]) -> frozenset[int]:
        writers = [rank for rank in leaders if machines[rank].folder_problem == ""]
        return assessment.add_machines(machines, unseen(folder, writers), skews)

    machine = describe_machine(config, grid.device, dtype, problem)
    again = agreement.agree("checking its machine and device", machine, Machine, assess_machines, frozenset[int])

    def assess_rates(rates: list[Rates | None]) -> None:
        assessment.add_second_rates(rates)
        assessment.conclude_devices()

    rates = measure_rates(grid.device, dtype) if location.rank in again else None
    agreement.agree("measuring its device", rates, Rates | None, assess_rates, None)
    hosts: dict[str, list[int]] = {}
    for other in locations:
        hosts.setdefault(other.host, []).append(other.rank)
    return list(hosts.values())


def _check_links(grid: Grid, hosts: list[list[int]], agreement: Agreement, assessment: Assessment) -> None:
    deadline = agreement.deadline - REPORTING_SECONDS
    rounds = link_rounds(hosts)
    for name in ("exchanging data with its neighbours", "doing so again"):  # outliers are measured twice
        exchanges = measure_links(grid, rounds, deadline)
        if not agreement.agree(name, exchanges, Exchanges, assessment.add_links, bool, lambda each: each.failures):
            break
    agreement.agree(
        "an all-reduce",
        measure_all_reduce(grid, deadline),
        AllReduce,
        assessment.add_all_reduce,
        None,
        lambda each: each.failures,
    )


def _report(lines: tuple[str, ...], warnings: tuple[str, ...], seconds: float, say: Callable[[str], object]) -> None:
    if lines:
        say("\n".join([f"Preflight, {seconds:.1f} s:", *(f"  {line}" for line in lines)]))
    for text in warnings:
        say(f"PREFLIGHT WARNING: {text}")

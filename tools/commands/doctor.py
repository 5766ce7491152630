"""`griffin doctor`: the preflight checks of a training, and checks of the installation."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from griffin.launch.discovery import discover, leave
from griffin.parallel.world.ranks import Ranks
from griffin.tools.runs.check_results import FAILED, OK, WARNING, CheckResult, has_failed, print_results
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config

PRELOAD = ("griffin.trainer.preflight.check",)
REPORT_SECONDS = 10.0  # wait for rank 0 to report, to which other ranks may still be passing a failure on


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check this installation, this machine and the links of its ranks",
        description="Check, as a training does before its first step, that ranks agree, that their devices and links "
        "are healthy and that they share DIR; then check the installation. Under torchrun, srun or mpiexec this "
        "process is one of their ranks; otherwise it starts --ranks processes here. Prints one line per check; exit "
        "code 1 if one failed. With CONFIG.toml, whose settings can follow as --section.key value, the disk space for "
        "its checkpoints and the shared memory of its data loaders are checked too.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, nargs="?")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes to start on this machine (default: one per GPU, else 2)"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(), metavar="DIR", help="folder for runs (default: the current one)"
    )
    parser.set_defaults(run=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    ranks = discover()
    if args.ranks is not None and args.ranks < 1:
        raise ValueError(f"--ranks {args.ranks}: must be at least 1")
    if ranks is not None and ranks.world_size > 1 and args.ranks is not None:
        raise ValueError(
            f"--ranks {args.ranks}: this process is one of {ranks.world_size} ranks that {ranks.source} started; "
            "leave --ranks out"
        )
    if args.config is None and args.overrides:
        raise ValueError(f"{args.overrides[0]}: settings need a CONFIG.toml")
    if not args.dir.is_dir():
        raise ValueError(f"--dir {args.dir}: must be a folder that exists")
    config = load_config(args.config, args.overrides) if args.config is not None else None
    if ranks is not None and (ranks.world_size > 1 or args.ranks is None):
        return _as_rank(ranks, config, args.dir)
    return _with_local_ranks(args.ranks, config, args.dir)


def _as_rank(ranks: Ranks, config: Config | None, folder: Path) -> int:
    """Check as one of a launcher's ranks; rank 0 reports."""
    try:
        results = check_rank(ranks, config, folder)
        if ranks.rank == 0:
            print_results(results)
        if has_failed(results):
            _leave_after_report(ranks, results)
        if ranks.rank == 0:
            from griffin.tools.runs.installation import examine_installation

            more = examine_installation(folder)
            print_results(more)
            results += more
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        leave(1)
    if has_failed(results):
        leave(1)
    return 0


def _leave_after_report(ranks: Ranks, results: Sequence[CheckResult]) -> NoReturn:
    """Exit once rank 0 has reported, since a launcher ends all ranks when one exits. If rank 0 never does, report."""
    import torch.distributed as dist

    from griffin.trainer.preflight.agreement import HEARING_SECONDS

    with suppress(dist.DistNetworkError):  # rank 0, which serves the store, is gone
        store = ranks.another_connection(timedelta(seconds=REPORT_SECONDS))
        if ranks.rank == 0:
            store.set("griffin/doctor/reported", "")
            time.sleep(HEARING_SECONDS)
            leave(1)
        try:
            store.wait(["griffin/doctor/reported"], timedelta(seconds=REPORT_SECONDS))
        except dist.DistStoreError:
            print_results(results)
    leave(1)


def _with_local_ranks(wanted: int | None, config: Config | None, folder: Path) -> int:
    """Start ranks on this machine, and report in this process."""
    import torch

    from griffin.launch.local import run_local

    gpus = torch.cuda.device_count()
    if wanted is not None and gpus and wanted > gpus:
        raise ValueError(f"--ranks {wanted}: must be at most {gpus}, the number of GPUs of this machine")
    world_size = wanted or gpus or 2
    results: list[CheckResult] = []
    with tempfile.TemporaryDirectory() as name:
        found = Path(name) / "results.json"
        code = run_local(check_local_rank, world_size, (config, folder, found), preload=PRELOAD)
        if found.exists():
            results += [(state, text) for state, text in json.loads(found.read_text(encoding="utf-8"))]
    if code and not has_failed(results):
        results.append((FAILED, f"ranks: {world_size} on this machine ended with exit code {code}"))
    print_results(results)
    # After the ranks have ended: it uses a GPU, which they must find free.
    from griffin.tools.runs.installation import examine_installation

    more = examine_installation(folder)
    print_results(more)
    return int(has_failed(results + more))


def check_local_rank(ranks: Ranks, config: Config | None, folder: Path, found: Path) -> None:
    results = check_rank(ranks, config, folder)
    if ranks.rank == 0 or has_failed(results):  # rank 0 may be the one that hangs
        beside = found.with_name(f"rank-{ranks.rank}")
        beside.write_text(json.dumps(results), encoding="utf-8")
        os.replace(beside, found)
    if has_failed(results):  # so that hanging ranks are ended too
        leave(1)


def check_rank(ranks: Ranks, config: Config | None, folder: Path) -> list[CheckResult]:
    """Run preflight with all ranks as data-parallel ones and return its results."""
    from griffin.parallel.config import ParallelConfig
    from griffin.parallel.world.grid import rank_grid
    from griffin.trainer.preflight.agreement import PreflightError
    from griffin.trainer.preflight.check import preflight

    failures: tuple[str, ...] = ()
    try:
        with rank_grid(ParallelConfig(), ranks) as grid:
            found = preflight(config, ranks, grid, folder, say=lambda text: None)
            lines, warnings = found.lines, found.warnings
    except PreflightError as error:  # caught outside of the grid, whose exit would wait for a hanging rank
        lines, warnings, failures = error.lines, error.warnings, error.failures
    return [
        *((OK, text) for text in lines),
        *((WARNING, text) for text in warnings),
        *((FAILED, text) for text in failures),
    ]

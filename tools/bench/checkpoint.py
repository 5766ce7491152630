"""`griffin bench checkpoint`: save and load a training's state, beside torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.parallel.config import ModelConfig, ParallelConfig
from griffin.parallel.world.ranks import Ranks
from griffin.tools.bench.checkpoint_state import BYTES_PER_PARAMETER, DcpState, fill, require_loaded
from griffin.trainer.settings.presets import preset
from griffin.trainer.settings.sections import Config, DataConfig, OptimizerConfig, TrainConfig
from griffin.trainer.settings.validate import validate

if TYPE_CHECKING:
    from griffin.parallel.world.grid import Grid
    from griffin.trainer.checkpoint.checkpoints import Checkpoints
    from griffin.trainer.step import Training

GIB = 2**30
SPACE = 3  # states on the disk at a time: one of each side, and one besides
TIMEOUT = timedelta(minutes=10)  # of every wait
PRELOAD = ("griffin.trainer.checkpoint.checkpoints", "torch.distributed.checkpoint", "torch.distributed.tensor")


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "checkpoint",
        help="saving and loading a training's state, beside torch.distributed.checkpoint",
        description="Time saving from data-parallel ranks, loading as tensor-parallel ones, and how long an "
        "asynchronous save stalls the training, beside torch.distributed.checkpoint (DCP) with its defaults, on CPUs. "
        "Both sides have the same float32 weights and Adam moments, processes and disk. Loaded values are compared "
        "with saved ones bit by bit before any load is timed.",
    )
    parser.add_argument("--model", default="griffin-100m", metavar="PRESET", help="default: griffin-100m")
    parser.add_argument("--vocabulary", type=int, default=32_000, metavar="N", help="default: 32000")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of each side (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder on the disk to measure (default: this one)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for setting in ("vocabulary", "ranks", "rounds"):
        if getattr(args, setting) < 1:
            raise ValueError(f"--{setting} {getattr(args, setting)}: must be at least 1")
    if not args.folder.is_dir():
        raise ValueError(f"--folder {args.folder}: must be a folder")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # compare on CPUs, even if there are GPUs
    model = dataclasses.replace(preset(args.model), vocabulary=args.vocabulary)
    for tensor in (1, args.ranks):
        bench_config(model, args.ranks, ParallelConfig(tensor=tensor))  # raises before any long work

    from griffin.parallel.world.grid import single_rank_grid
    from griffin.trainer.summary import count_parameters

    with single_rank_grid() as grid:
        size = BYTES_PER_PARAMETER * sum(count_parameters(model, grid))
    free = shutil.disk_usage(args.folder).free
    if free < SPACE * size:
        raise ValueError(
            f"--folder {args.folder}: {free / GIB:.2f} GiB are free; must be at least {SPACE * size / GIB:.2f} GiB, "
            f"{SPACE} times the state of {args.model}"
        )
    _print_heading(args, size)
    return measure(model, args.ranks, args.rounds, args.folder, size)


def measure(model: ModelConfig, ranks: int, rounds: int, folder: Path, size: int) -> int:
    """Run all parts of the benchmark in a new folder below `folder`, and print the results.

    Args:
        model: the model whose state is saved.
        ranks: number of data-parallel ranks that save, and of tensor-parallel ranks that load.
        rounds: number of timed rounds, after one that is not timed.
        folder: a folder on the disk to measure.
        size: bytes of the whole state.

    Returns:
        An exit code: 0, or that of a failed rank.
    """
    from griffin.launch.local import run_local

    parts: list[tuple[Callable[[Ranks, BenchSettings], None], int, ParallelConfig]] = [
        (save_rank, ranks, ParallelConfig()),
        (load_rank, ranks, ParallelConfig(tensor=ranks)),
    ]
    if ranks > 1:
        parts.append((stall_rank, 1, ParallelConfig()))
    with tempfile.TemporaryDirectory(prefix="griffin-bench-", dir=folder) as scratch:
        for part, world_size, parallel in parts:
            bench = BenchSettings(
                config=bench_config(model, world_size, parallel), rounds=rounds, folder=Path(scratch), size=size
            )
            if code := run_local(part, world_size, (bench,), preload=PRELOAD):
                return code
    return 0


def bench_config(model: ModelConfig, ranks: int, parallel: ParallelConfig) -> Config:
    config = Config(
        model=model,
        parallel=parallel,
        data=DataConfig(train=("none",)),  # no data are read
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
        train=TrainConfig(global_batch=ranks // parallel.model_ranks, dtype="float32"),
    )
    validate(config, ranks)
    return config


def _print_heading(args: argparse.Namespace, size: int) -> None:
    from griffin.launch.local import cores
    from griffin.tools.bench.machine import processor

    print(
        f"{time.strftime('%Y-%m-%d')}; {processor()}, {cores()} cores, load average {os.getloadavg()[0]:.1f}; "
        f"{disk(args.folder)}; python {platform.python_version()}, torch {version('torch')}, "
        f"megatron-core {version('megatron-core')}\n"
        f"{args.model}, vocabulary {args.vocabulary}: float32 weights, exp_avg and exp_avg_sq, {size:,} bytes "
        f"({size / GIB:.2f} GiB)\n"
        f"saved from {args.ranks} data-parallel ranks, loaded as {args.ranks} tensor-parallel ones; both sides "
        "sync their files; medians of "
        f"{args.rounds} rounds after one that is left out",
        flush=True,
    )


def disk(folder: Path) -> str:
    """Return the type and the device of the file system that holds a folder."""
    found, longest = "unknown file system", ""
    with suppress(OSError), open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            device, mount, kind = line.split()[:3]
            if folder.resolve().is_relative_to(mount) and len(mount) >= len(longest):
                found, longest = f"{kind} on {device}", mount
    return found


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of one part of the benchmark, for its ranks."""

    config: Config
    rounds: int
    folder: Path  # temporary folder of this benchmark
    size: int  # bytes of the whole state

    @property
    def ours(self) -> Path:
        return self.folder / "griffin"

    @property
    def theirs(self) -> Path:
        return self.folder / "dcp"

    def rate(self, seconds: float) -> str:
        return f"{self.size / GIB / seconds:7.3f} GiB/s"


class Stopwatch:
    """Collects the seconds of each side, round by round; the same on all ranks."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self._seconds: dict[str, list[float]] = {}

    def time(self, side: str, work: Callable[[], object]) -> None:
        """Time work from a barrier until the slowest rank has finished. A collective."""
        import torch.distributed as dist

        dist.barrier()
        begun = time.perf_counter()
        work()
        self.add(side, time.perf_counter() - begun)

    def add(self, side: str, seconds: float) -> None:
        """Add the time of the slowest rank. A collective."""
        self._seconds.setdefault(side, []).append(max(self._grid.all_gather(seconds, float)))

    def report(self, title: str, rate: Callable[[float], str], notes: Mapping[str, str] | None = None) -> None:
        """Print medians without the first round, and the ratio of each DCP time to ours: of medians and per round."""
        if not self._grid.is_first_rank:
            return
        rounds = {side: seconds[1:] for side, seconds in self._seconds.items()}
        median = {side: statistics.median(seconds) for side, seconds in rounds.items()}
        for side, seconds in median.items():
            note = f"  {notes[side]}" if notes and side in notes else ""
            print(f"{title:<14} {side:<20} {1000 * seconds:9.1f} ms {rate(seconds)}{note}")
        for side, theirs in rounds.items():
            if side.startswith("dcp"):
                ratios = sorted(their / our for our, their in zip(rounds["griffin"], theirs, strict=True))
                print(
                    f"{title:<14} ratio of {side:<11} {median[side] / median['griffin']:9.2f}    "
                    f"(rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})",
                    flush=True,
                )


# Parts of the benchmark, as run by each rank


def save_rank(ranks: Ranks, bench: BenchSettings) -> None:
    """Time saves, leave a checkpoint of each side on the disk, and time asynchronous saves."""
    with _saving(ranks, bench) as (grid, training, state):
        time_saves(grid, bench, training, state)
        time_stalls(grid, bench, training, state)


def stall_rank(ranks: Ranks, bench: BenchSettings) -> None:
    """Time how long asynchronous saves stall a rank."""
    with _saving(ranks, bench) as (grid, training, state):
        time_stalls(grid, bench, training, state)


@contextmanager
def _saving(ranks: Ranks, bench: BenchSettings) -> Iterator[tuple[Grid, Training, dict[str, Any]]]:
    """Build a training with the random state, and the same state for DCP."""
    from griffin.parallel.world.grid import rank_grid
    from griffin.trainer.step import Training

    with rank_grid(bench.config.parallel, ranks, timeout=TIMEOUT) as grid:
        training = Training(bench.config, grid)
        fill(training, grid)
        yield grid, training, DcpState(training, grid, tensor_parallel=False).state()


@contextmanager
def _checkpoints(bench: BenchSettings, grid: Grid, training: Training, root: Path) -> Iterator[Checkpoints]:
    from griffin.trainer.checkpoint.checkpoints import Checkpoints, Outcome

    def refuse(outcome: Outcome) -> None:
        if outcome.error is not None:
            raise RuntimeError(outcome.error)

    made = Checkpoints(bench.config, grid, training, root, host="127.0.0.1", attempt=1, lock=None, report=refuse)
    with made as checkpoints:
        yield checkpoints


def time_saves(grid: Grid, bench: BenchSettings, training: Training, state: dict[str, Any]) -> None:
    """Time saves until they are on the disk, and, for reference, np.save of as many bytes on each rank."""
    import numpy as np
    import torch.distributed.checkpoint as dcp

    from griffin.trainer.checkpoint.checkpoints import Position

    watch = Stopwatch(grid)
    plain = bench.folder / f"rank-{grid.rank}.npy"
    share = np.random.default_rng(0).standard_normal(bench.size // 4 // grid.world_size, np.float32)

    def save_plain(synchronised: bool) -> None:
        with open(plain, "wb") as file:
            np.save(file, share)
            if synchronised:
                os.fsync(file.fileno())

    with _checkpoints(bench, grid, training, bench.ours) as checkpoints:
        for step in range(1, bench.rounds + 2):
            _remove(grid, bench.ours, bench.theirs)
            watch.time("griffin", partial(checkpoints.finish, Position(step=step)))
            watch.time("dcp", partial(dcp.save, state, storage_writer=dcp.FileSystemWriter(bench.theirs)))
            for synchronised in (False, True):
                watch.time(f"np.save{' + fsync' * synchronised}", partial(save_plain, synchronised))
                plain.unlink()
    watch.report("save", bench.rate, {"griffin": _files(bench.ours), "dcp": _files(bench.theirs)})


def time_stalls(grid: Grid, bench: BenchSettings, training: Training, state: dict[str, Any]) -> None:
    """Time how long an asynchronous save takes to return; each is complete before the next one begins.

    For reference, also time a memory copy of as many bytes.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    from griffin.trainer.checkpoint.checkpoints import Position

    os.environ["MASTER_ADDR"] = "127.0.0.1"  # where DCP's processes find each other
    watch = Stopwatch(grid)
    ours, theirs = bench.folder / "griffin-stalls", bench.folder / "dcp-stalls"
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    # Reuses its memory for all saves, as ours does; DCP's default allocates a copy for each.
    stager = DefaultStager(StagingOptions(False, False, False, False))
    peers: dict[str, dict[str, Any]] = {
        "dcp thread": {"async_checkpointer_type": thread},
        "dcp thread, kept": {"async_checkpointer_type": thread, "async_stager": stager},
        "dcp process": {"async_checkpointer_type": process},
    }
    source, copied = torch.ones(2, bench.size // 4 // grid.world_size)
    with _checkpoints(bench, grid, training, ours) as checkpoints:
        for step in range(1, bench.rounds + 2):
            _remove(grid, ours)
            seconds = checkpoints.save(Position(step=step))
            checkpoints.finish(Position(step=step))
            watch.add("griffin", seconds)
            begun = time.perf_counter()
            copied.copy_(source)
            watch.add("memory copy", time.perf_counter() - begun)
            for side, options in peers.items():
                _remove(grid, theirs)
                begun = time.perf_counter()
                saved: Any = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(theirs), **options)
                seconds = time.perf_counter() - begun
                saved.result(TIMEOUT.total_seconds())
                watch.add(side, seconds)
    stager.close()
    _remove(grid, ours, theirs)
    gib = bench.size / grid.world_size / GIB
    many = f"{grid.world_size} rank{'s' * (grid.world_size > 1)}"
    watch.report(f"stall, {many}", lambda seconds: f"{seconds / gib:7.3f} s per GiB of a rank")


def load_rank(ranks: Ranks, bench: BenchSettings) -> None:
    """Check what both sides load, then time loading."""
    import torch.distributed.checkpoint as dcp

    from griffin.parallel.world.grid import rank_grid
    from griffin.trainer.checkpoint.manifest import check
    from griffin.trainer.checkpoint.state import ShardedState
    from griffin.trainer.checkpoint.steps import resolve
    from griffin.trainer.step import Training

    with rank_grid(bench.config.parallel, ranks, timeout=TIMEOUT) as grid:
        training = Training(bench.config, grid)
        state, folder = ShardedState(training, grid), resolve(bench.ours)
        peer = DcpState(training, grid, tensor_parallel=True)
        loaded = peer.empty()

        def ours() -> None:
            state.load(folder, check(folder), everything=True)

        def theirs() -> None:
            dcp.load(loaded, storage_reader=dcp.FileSystemReader(bench.theirs))

        ours()
        require_loaded(training, grid)
        theirs()
        peer.require_loaded(loaded)
        for title, is_cold in (("load, cold", True), ("load, warm", False)):
            watch = Stopwatch(grid)
            for _ in range(bench.rounds + 1):
                for side, work, files in (("griffin", ours, bench.ours), ("dcp", theirs, bench.theirs)):
                    if is_cold and grid.is_first_rank:
                        evict(files)
                    watch.time(side, work)
            watch.report(title, bench.rate)


def evict(folder: Path) -> None:
    """Drop a folder's files from the system's page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _files(folder: Path) -> str:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{len(sizes):,} files, {sum(sizes):,} bytes"


def _remove(grid: Grid, *folders: Path) -> None:
    """Remove folders and sync, so that no side's time includes it. A collective."""
    import torch.distributed as dist

    if grid.is_first_rank:
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)
        os.sync()
    dist.barrier()

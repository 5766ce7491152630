"""`griffin train`: check everything that can be checked, then train on local ranks or as one rank of a launcher's."""

from __future__ import annotations

import argparse
import traceback
from pathlib import Path
from typing import Any

from griffin.launch.ranks import discover, leave, slurm_tasks_unused
from griffin.parallel.ranks import Ranks
from griffin.tools.cli import USER_ERRORS, report
from griffin.trainer.config import Config, load_config
from griffin.trainer.run_folder import RunFolder, default_run_folder
from griffin.trainer.validate import validate, validate_data

# Imported once for all local ranks.
PRELOAD = ("griffin.trainer.loop",)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model",
        description="Train the model of CONFIG.toml. Any setting can follow as --section.key value. Under torchrun, "
        "srun or mpiexec this process is one of their ranks; otherwise it starts --ranks processes here.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (default: log.run_root/NAME-TIME)")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes to start on this machine (default: 1)")
    parser.set_defaults(run=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    """Exit code of the training. What a user can put right is refused before any process or folder exists."""
    ranks = _discover(args.ranks)
    if ranks is None:
        return _run_local(args)
    try:
        config, run_dir = _check(args, ranks.world_size, makes_folder=ranks.rank == 0)
    except USER_ERRORS as error:
        leave(report(error))
    try:
        train_rank(ranks, config, run_dir)
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        leave(1)
    return 0


def _check(args: argparse.Namespace, world_size: int, makes_folder: bool) -> tuple[Config, Path]:
    """The config and the run folder, found fit to start with."""
    config = load_config(args.config, args.overrides)
    validate(config, world_size)
    validate_data(config)
    run_dir = args.run_dir or default_run_folder(args.config, config)
    if makes_folder:  # other ranks may look when it has been made
        RunFolder.check(run_dir, config)
    return config, run_dir


def train_rank(ranks: Ranks, config: Config, run_dir: Path) -> None:
    """What each rank does."""
    from griffin.trainer.loop import train

    train(config, ranks, run_dir)


def _discover(local_ranks: int | None) -> Ranks | None:
    """The launcher's ranks, or None where this process starts its own."""
    if local_ranks is not None and local_ranks < 1:
        raise ValueError(f"--ranks {local_ranks}: must be at least 1")
    ranks = discover()
    if local_ranks is None:
        tasks = slurm_tasks_unused()
        if ranks is None and tasks > 1:
            raise ValueError(
                f"SLURM_NTASKS = {tasks}, but this process was not started by srun: start it with `srun griffin "
                "train ...`, or state --ranks to train in this process's children only"
            )
    elif ranks is not None and ranks.world_size > 1:
        raise ValueError(
            f"--ranks {local_ranks}: this process is one of {ranks.world_size} ranks that {ranks.source} started; "
            "leave --ranks out"
        )
    else:
        ranks = None  # an interactive shell that srun started is a world of one
    return ranks


def _run_local(args: argparse.Namespace) -> int:
    world_size = args.ranks or 1
    config, run_dir = _check(args, world_size, makes_folder=True)

    import torch

    from griffin.launch.local import run_local

    gpus = torch.cuda.device_count()
    if gpus and world_size > gpus:
        raise ValueError(
            f"--ranks {world_size}: must be at most {gpus}, the number of GPUs of this machine, or "
            "CUDA_VISIBLE_DEVICES= must be set, to train on CPUs"
        )
    return run_local(train_rank, world_size, (config, run_dir), preload=PRELOAD)

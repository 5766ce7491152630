"""`griffin train`: check all settings and files, then train on local ranks or as one of a launcher's ranks."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from griffin.kernels.backends import AUTO
from griffin.launch import code
from griffin.launch.discovery import discover, failure_text, leave, slurm_tasks_unused
from griffin.parallel.config import ModelConfig
from griffin.parallel.world.ranks import STOPPED, Ranks
from griffin.tools.common.errors import USER_ERRORS, report
from griffin.trainer.run.folder import RunFolder, default_run_folder
from griffin.trainer.schedule import PreviousRun
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.load import read_settings, to_toml
from griffin.trainer.settings.sections import Config
from griffin.trainer.settings.validate import validate, validate_data

if TYPE_CHECKING:
    from griffin.trainer.checkpoint.source import InitFrom

# Modules imported once for all local ranks.
PRELOAD = ("griffin.trainer.loop",)
# Time after SIGTERM for local ranks to finish their step and save. A scheduler that allows less kills them itself.
SAVE_SECONDS = 15 * 60.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model",
        description="Train the model of CONFIG.toml. Any setting can follow as --section.key value (--help-settings "
        'prints them all); --data.train "0.7 a" "0.3 b" blends data, --data.eval none evaluates nothing, '
        "--data.eval.NAME c adds a held-out set with figures of its own. Under torchrun, "
        "srun or mpiexec this process is one of their ranks; otherwise it starts --ranks processes here. A run folder "
        f"that has checkpoints is resumed. SIGTERM or SIGUSR1 saves and stops, with exit code {STOPPED}.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="a file, or the name of a packaged one: demo")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (default: log.run_root/NAME-TIME)")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes to start on this machine (default: 1)")
    add_init_arguments(parser)
    parser.add_argument(
        "--code", type=Path, metavar="DIR", help="exit with an error unless griffin is imported from DIR"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything for --ranks ranks of any launcher, and start none"
    )
    parser.add_argument("--print-config", action="store_true", help="print all resolved settings as TOML, and exit")
    parser.add_argument(
        "--help-settings", action=PrintSettings, nargs=0, help="print every setting, its default and meaning, and exit"
    )
    parser.set_defaults(run=run, overrides=[])


class PrintSettings(argparse.Action):
    """Print the table of all settings and exit, as --help does, whatever the other arguments are."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from griffin.trainer.settings.reference import settings_reference

        print(settings_reference(), end="")
        parser.exit()


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="CHECKPOINT",
        help="start a new run from CHECKPOINT, a step folder, or a run folder for its newest step; a run that has "
        "checkpoints of its own resumes from those. CONFIG.toml may leave out [model]: it is the checkpoint's",
    )
    parser.add_argument(
        "--init-what",
        choices=("weights", "all"),
        help="what --init-from loads: weights (default), or all: also optimizer state, step and position in the data",
    )


def run(args: argparse.Namespace) -> int:
    """Train and return the exit code. Mistakes of the user are refused before any process or folder is created."""
    # An early warning of a stop must not end a rank that is just starting: it has nothing to save yet.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if args.code is not None:
        try:
            code.refuse_other(args.code)
        except ValueError as error:
            leave(report(error))
    if args.print_config:
        print(to_toml(load_run_config(args)), end="")
        return 0
    if args.dry_run:
        _check_ranks(args.ranks)
        config, _, _ = check(args, args.ranks or 1)
        _print_summary(config, args.ranks or 1)
        return 0
    ranks = discover_ranks(args.ranks)
    if ranks is None:
        return start_local(args)()
    try:
        config, run_dir, init_from = check(
            args, ranks.world_size, makes_folder=ranks.rank == 0, reads_data=ranks.local_rank == 0
        )
    except USER_ERRORS as error:
        leave(report(error))
    try:
        train_rank(ranks, config, run_dir, init_from)
    except SystemExit as stop:
        if ranks.source != "slurm":  # srun would report the exit code of a rank that it had to kill
            raise
        leave(stop.code if isinstance(stop.code, int) else 1)
    except (Exception, KeyboardInterrupt) as error:
        print(failure_text(error), end="", file=sys.stderr)
        leave(1)
    return 0


def _print_summary(config: Config, world_size: int) -> None:
    from griffin.parallel.world.grid import single_rank_grid
    from griffin.trainer.summary import summarize

    with single_rank_grid() as grid:
        print(summarize(config, world_size, grid))


def check(
    args: argparse.Namespace,
    world_size: int,
    *,
    makes_folder: bool = True,
    starts_here: bool = True,
    reads_data: bool = True,
) -> tuple[Config, Path, InitFrom | None]:
    """Check everything that can be checked before ranks start; return the config, the run folder and --init-from.

    `makes_folder`: also check the run folder and what the run starts from. `starts_here`: also check that this machine
    has the kernels. `reads_data`: also check the data's contents. Raises ValueError.
    """
    from griffin.tools.weights.hf.names import differences
    from griffin.trainer.checkpoint.source import InitFrom, find_source, refuse_other_model

    if args.init_what and not args.init_from:
        raise ValueError(f"--init-what {args.init_what}: needs --init-from CHECKPOINT")
    config = load_run_config(args)
    validate(config, world_size)
    validate_data(config, contents=reads_data)
    if starts_here:
        _check_kernels(config)
    run_dir = args.run_dir or default_run_folder(args.config, config)
    init_from = InitFrom(path=args.init_from, everything=args.init_what == "all") if args.init_from else None
    if makes_folder:  # other ranks may come after it was created
        RunFolder.check(run_dir, config)
        source = find_source(run_dir, init_from)
        if source.path and source.config:
            refuse_other_model(config.model, source.config["model"], source.path)
        if source.everything and source.config:
            earlier = PreviousRun(config=source.config, step=source.step)
            config = load_run_config(args, earlier)
            validate(config, world_size)
    if makes_folder and (found := differences(config.model)):
        note = f"Note: `griffin export hf` will refuse this model, which transformers does not have: {'; '.join(found)}"
        print(note, file=sys.stderr)  # stdout may be a job's script
    return config, run_dir, init_from


def load_run_config(args: argparse.Namespace, earlier: PreviousRun | None = None) -> Config:
    """Load the config of a training. A missing [model] is that of the run folder, else that of --init-from; `earlier`
    gives the schedule of a run that is continued."""
    from griffin.trainer.checkpoint.manifest import check as check_step
    from griffin.trainer.checkpoint.steps import resolve

    def find_model() -> ModelConfig | None:
        if args.run_dir is not None and RunFolder(args.run_dir).config.is_file():
            return read_settings(RunFolder(args.run_dir).config).model
        return check_step(resolve(args.init_from)).model if args.init_from else None

    return load_config(args.config, args.overrides, find_model=find_model, previous=earlier)


def _check_kernels(config: Config) -> None:
    """Raise ValueError if this machine cannot run the chosen kernels or attention, or replay them as a CUDA graph."""
    train = config.train
    if (train.kernels, train.attention, train.cuda_graphs) == (AUTO, AUTO, False):
        return
    import torch

    from griffin.kernels import local_attention, selection
    from griffin.trainer.graph import check_graphs

    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, train.dtype)
    check_graphs(train.cuda_graphs, device)
    selection.resolve_backend(train.kernels, device, dtype, "train.kernels")
    local_attention.resolve_backend(train.attention, device, dtype, config.model.head_dim, "train.attention")


def train_rank(ranks: Ranks, config: Config, run_dir: Path, init_from: InitFrom | None) -> None:
    """Train as one rank. Raises SystemExit with STOPPED if the training was asked to stop, and saved."""
    from griffin.trainer.loop import train

    if train(config, ranks, run_dir, init_from):
        sys.exit(STOPPED)


def discover_ranks(local_ranks: int | None) -> Ranks | None:
    """Return the launcher's ranks, or None if this process is to start its own."""
    _check_ranks(local_ranks)
    ranks = discover()
    tasks, nodes = slurm_tasks_unused(), int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    if ranks is None and tasks > 1 and (local_ranks != tasks or nodes > 1):
        stated = f" and --ranks is {local_ranks}" if local_ranks else ""
        raise ValueError(
            f"SLURM_NTASKS = {tasks}, but this process was not started by srun{stated}: start it with `srun griffin "
            f"train ...`, or, on a single node, state --ranks {tasks}"
        )
    if local_ranks is None:
        return ranks
    if ranks is not None and ranks.world_size > 1:
        raise ValueError(
            f"--ranks {local_ranks}: this process is one of {ranks.world_size} ranks that {ranks.source} started; "
            "leave --ranks out"
        )
    else:
        ranks = None  # an interactive shell started by srun is a world of one rank
    return ranks


def _check_ranks(ranks: int | None) -> None:
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks {ranks}: must be at least 1")


def start_local(args: argparse.Namespace) -> Callable[[], int]:
    """Check everything, and return a function that starts --ranks ranks on this machine and returns the exit code."""
    world_size = args.ranks or 1
    config, run_dir, init_from = check(args, world_size)

    import torch

    from griffin.launch.local import run_local

    gpus = torch.cuda.device_count()
    if gpus and world_size > gpus:
        raise ValueError(
            f"--ranks {world_size}: must be at most {gpus}, the number of GPUs of this machine, or "
            "CUDA_VISIBLE_DEVICES= must be set, to train on CPUs"
        )
    rank_arguments = (config, run_dir, init_from)
    return partial(run_local, train_rank, world_size, rank_arguments, preload=PRELOAD, save_seconds=SAVE_SECONDS)

"""`griffin checkpoint`: list, inspect, verify, compare, reshard, average and plan checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from griffin.tools.common.arguments import NEWEST_HELP, add_command, add_dtype

PATH_HELP = "step folder, or a run's folder (or its checkpoints folder) for all of its steps"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "checkpoint", help="list, inspect, verify, compare, reshard, average or plan checkpoints"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = add_command(commands, "list", _list, "print size, date, layout and state of each step")
    command.add_argument("paths", metavar="PATH", nargs="+", type=Path, help=PATH_HELP)

    command = add_command(commands, "inspect", _inspect, "print step, config and arrays, or a single array")
    command.add_argument("path", metavar="PATH", type=Path, help=NEWEST_HELP)
    command.add_argument(
        "--array",
        metavar="NAME",
        help="print one array instead: shape, dtype, sharded axis, mean, std, min, max, zeros, corners; such as "
        "model.embedding.weight",
    )
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add_command(
        commands,
        "verify",
        _verify,
        "read every chunk of every step and compare its checksum; names damaged files, with exit code 1",
    )
    command.add_argument("paths", metavar="PATH", nargs="+", type=Path, help=PATH_HELP)
    command.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core)")

    command = add_command(
        commands,
        "diff",
        _diff,
        "compare step, settings and every array; exit code 0 if all are equal, 1 if not",
    )
    command.add_argument("a", metavar="A", type=Path, help=NEWEST_HELP)
    command.add_argument("b", metavar="B", type=Path, help="likewise")
    command.add_argument("--weights-only", action="store_true", help="compare only the model's weights")
    _add_workers(command)

    command = add_command(
        commands,
        "reshard",
        _reshard,
        "write a checkpoint chunked for a layout, so that each rank reads whole chunks only, or as one file per rank",
    )
    command.add_argument("source", metavar="SRC", type=Path, help=NEWEST_HELP)
    command.add_argument("target", metavar="DST", type=Path, help="step folder to create; must not exist")
    command.add_argument(
        "--tensor",
        type=int,
        metavar="T",
        help="tensor-parallel size: every sharded tensor is cut into T parts (default, with no other size given: the "
        "chunks that training saves)",
    )
    command.add_argument(
        "--pipeline",
        type=int,
        metavar="P",
        help="pipeline-parallel size, for --rank-files; otherwise only recorded, since stages cut no array",
    )
    command.add_argument("--virtual", type=int, metavar="V", help="stages per pipeline rank; as --pipeline")
    command.add_argument("--weights-only", action="store_true", help="leave out the optimizer state")
    add_dtype(command, "dtype of the weights, rounded from the master weights if there are any (default: as stored)")
    command.add_argument(
        "--rank-files",
        action="store_true",
        help="write DST as one safetensors file per (tensor, pipeline) rank, with an index.json",
    )
    command.add_argument("--from-ranks", action="store_true", help="SRC is a folder written with --rank-files")
    _add_workers(command)

    command = add_command(
        commands, "average", _average, "write the mean of the weights of several checkpoints, without optimizer state"
    )
    command.add_argument("sources", metavar="SRC", nargs="+", type=Path, help=NEWEST_HELP)
    command.add_argument("target", metavar="DST", type=Path, help="step folder to create; must not exist")
    add_dtype(command, "dtype of the result (default: that of the newest SRC)")
    _add_workers(command)

    command = commands.add_parser(
        "plan",
        help="print what saving a training would write, without running it",
        description="Print the files that a checkpoint of the training of CONFIG.toml on N ranks consists of, and what "
        "each rank stages, writes and exchanges for it. Nothing is allocated and no GPU is used. Of the data, only the "
        "tokenizer's vocabulary is read, if the config does not state one. Any setting can follow as --section.key "
        "value.",
    )
    command.add_argument("config", metavar="CONFIG.toml", type=Path)
    command.add_argument("--ranks", type=int, metavar="N", required=True, help="ranks of the training")
    command.set_defaults(run=_plan, overrides=[])


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="worker processes (default: one per core; under mpiexec, its ranks)",
    )


def _list(args: argparse.Namespace) -> None:
    from griffin.tools.checkpoints.inspection import print_list

    print_list(args.paths)


def _inspect(args: argparse.Namespace) -> None:
    from griffin.tools.checkpoints.inspection import print_array, print_checkpoint

    if args.array is None:
        print_checkpoint(args.path, args.json)
    else:
        print_array(args.path, args.array, args.json)


def _verify(args: argparse.Namespace) -> int:
    from griffin.tools.checkpoints.inspection import verify_steps

    return verify_steps(args.paths, args.workers)


def _diff(args: argparse.Namespace) -> int:
    from griffin.tools.checkpoints.comparison import diff
    from griffin.tools.common.workers import start_workers

    with start_workers(args.workers) as workers:
        return diff(args.a, args.b, workers, weights_only=args.weights_only) if workers else 0


def _reshard(args: argparse.Namespace) -> None:
    from griffin.parallel.config import ParallelConfig
    from griffin.tools.checkpoints.rewrite import reshard
    from griffin.tools.common.workers import start_workers

    sizes = {"tensor": args.tensor, "pipeline": args.pipeline, "virtual_pipeline": args.virtual}
    stated = {name: size for name, size in sizes.items() if size is not None}
    for name, size in stated.items():
        if size < 1:
            raise ValueError(f"--{name.removesuffix('_pipeline')} {size}: must be at least 1")
    with start_workers(args.workers) as workers:
        if workers:
            reshard(
                args.source,
                args.target,
                ParallelConfig(**stated) if stated else None,
                workers,
                weights_only=args.weights_only,
                dtype=args.dtype,
                from_ranks=args.from_ranks,
                to_ranks=args.rank_files,
            )


def _average(args: argparse.Namespace) -> None:
    from griffin.tools.checkpoints.rewrite import average
    from griffin.tools.common.workers import start_workers

    with start_workers(args.workers) as workers:
        if workers:
            average(args.sources, args.target, workers, dtype=args.dtype)


def _plan(args: argparse.Namespace) -> None:
    from griffin.tools.checkpoints.save_plan import print_plan
    from griffin.trainer.settings.complete import load_config

    print_plan(load_config(args.config, args.overrides), args.ranks)

"""`griffin launch`: train as a SLURM job or on this machine, restarting until the run is complete."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from griffin.launch import code
from griffin.launch.slurm import IMAGE_FILES, JobFiles, SlurmJob, render
from griffin.parallel.world.ranks import STOPPED
from griffin.tools.commands.train import add_init_arguments, check, discover_ranks, load_run_config, start_local
from griffin.trainer.run.folder import RunFolder, default_run_folder
from griffin.trainer.settings.complete import read_data
from griffin.trainer.settings.load import to_toml
from griffin.trainer.settings.sections import Config

# Files that `griffin launch slurm` writes for a job: NAME, NAME-2 and so on.
FILES = (("job", ".sbatch"), ("config", ".toml"), ("setup", ".sh"), ("code", ".json"), ("code", ".diff"), ("code", ""))
# Folders that are usually local to each node.
NODE_LOCAL = ("/tmp", "/dev/shm", "/run")
# Exit codes after which a training on this machine is not restarted: complete, or stopped by a person.
ENDS = (0, STOPPED, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "launch",
        help="start a training that is restarted after failures",
        description="Train as `griffin train` does, and restart after failures until the run is complete.",
    )
    where = parser.add_subparsers(required=True, metavar="WHERE")
    _add_slurm(where)
    _add_local(where)


def _add_slurm(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "slurm",
        help="write or submit a batch script for SLURM",
        description="Check everything, write a batch script and all files that it needs to RUN/launch, and print or "
        "submit it. One rank per GPU. Any setting can follow as --section.key value.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path)
    parser.add_argument("--run-dir", type=Path, metavar="RUN", help="run folder (default: log.run_root/NAME-TIME)")
    add_init_arguments(parser)
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", required=True, metavar="[TYPE:]N", help="such as h100:8; 0 trains on CPUs")
    parser.add_argument("--gres", action="store_true", help="request GPUs with --gres=gpu:...")
    parser.add_argument("--no-exclusive", action="store_true", help="share nodes with other jobs")
    parser.add_argument("--mem", default="", metavar="SIZE", help="memory per node (default: all of an unshared node)")
    parser.add_argument(
        "--cpu-bind", default="", metavar="HOW", help="as for srun, such as cores or ldoms (default: near its GPU)"
    )
    parser.add_argument("--tasks-per-node", type=int, default=0, metavar="N", help="ranks per node without GPUs")
    parser.add_argument("--time", required=True, metavar="TIME", help="time limit of a job: 24:00:00 or 2-00:00:00")
    parser.add_argument("--cpus-per-task", type=int, default=0, metavar="N", help="default: a node's cores / ranks")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--qos", default="")
    parser.add_argument(
        "--job-name",
        metavar="NAME",
        help="default: griffin-RUN-HASH of its path; jobs of one name run in turn",
    )
    parser.add_argument(
        "--sbatch-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an additional option of sbatch, or one that replaces the script's",
    )
    parser.add_argument(
        "--container",
        default="",
        metavar="IMAGE",
        help="a .sif file for Apptainer, or a .sqsh file or an image's name for pyxis",
    )
    parser.add_argument(
        "--mount", type=Path, action="append", default=[], metavar="DIR", help="an additional folder for the container"
    )
    parser.add_argument("--setup", type=Path, metavar="FILE", help="shell commands to run first in the job")
    parser.add_argument(
        "--python", metavar="PATH", help="interpreter of the ranks (default: this one; python3 in a container)"
    )
    parser.add_argument(
        "--snapshot", action="store_true", help="run a copy of the code, unaffected by later edits of the checkout"
    )
    parser.add_argument(
        "--signal-seconds",
        type=int,
        default=SlurmJob.signal_seconds,
        metavar="S",
        help="seconds left for saving before the time limit (default: %(default)s)",
    )
    _add_max_restarts(parser)
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="submit N jobs, one after the other")
    parser.add_argument("--submit", action="store_true", help="submit the script instead of printing it")
    parser.set_defaults(run=run_slurm, overrides=[])


def _add_local(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "local",
        help="train on this machine, with restarts",
        description="For a machine without a scheduler: run `griffin train --ranks N`, and restart it after failures. "
        "Any setting can follow as --section.key value.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path)
    parser.add_argument("--run-dir", type=Path, metavar="RUN", help="run folder (default: log.run_root/NAME-TIME)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes to start (default: 1)")
    add_init_arguments(parser)
    _add_max_restarts(parser)
    parser.set_defaults(run=run_local, overrides=[])


def _add_max_restarts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=SlurmJob.max_restarts,
        metavar="N",
        help="consecutive restarts without a newer checkpoint in between (default: %(default)s)",
    )


def run_slurm(args: argparse.Namespace) -> int:
    """Write a job's files, and print or submit its script."""
    if args.chain < 1:
        raise ValueError(f"--chain {args.chain}: must be at least 1")
    if args.submit and shutil.which("sbatch") is None:
        raise ValueError("--submit: there is no sbatch on this machine; without --submit, the script is only written")
    if args.setup is not None and not args.setup.is_file():
        raise ValueError(f"--setup {args.setup}: no such file")
    for folder in args.mount:
        if not folder.is_dir():
            raise ValueError(f"--mount {folder}: no such folder")
    gpu_type, _, gpus = args.gpus_per_node.rpartition(":")
    if not re.fullmatch("-?[0-9]+", gpus):
        raise ValueError(f"--gpus-per-node {args.gpus_per_node}: must be a number, or TYPE:NUMBER such as h100:8")
    job = SlurmJob(
        name=args.job_name or "griffin",
        nodes=args.nodes,
        gpus_per_node=int(gpus),
        gpu_type=gpu_type,
        gres=args.gres,
        exclusive=not args.no_exclusive,
        mem=args.mem,
        cpu_bind=args.cpu_bind,
        time=args.time,
        tasks_per_node=args.tasks_per_node,
        cpus_per_task=args.cpus_per_task,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        container=os.path.abspath(args.container) if args.container.endswith(IMAGE_FILES) else args.container,
        signal_seconds=args.signal_seconds,
        max_restarts=args.max_restarts,
        options=tuple(f"--{option.removeprefix('--')}" for option in args.sbatch_option),
    )
    job.validate()
    config, run_dir, init_from = check(args, job.world_size, starts_here=False)
    run_dir, working = Path(os.path.abspath(run_dir)), Path.cwd()
    init: tuple[str, ...] = ()
    if init_from is not None:
        init = ("--init-from", os.path.abspath(init_from.path), "--init-what", args.init_what or "weights")
    mounts = [run_dir, working, *(Path(folder).absolute() for folder in args.mount), *_data_folders(config)]
    job = dataclasses.replace(
        job,
        name=args.job_name or f"griffin-{run_dir.name}-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:6]}",
        mounts=tuple(dict.fromkeys(mounts + [Path(path) for path in init[1:2]])) if args.container else (),
    )
    # Absolute, but with links kept: the interpreter of a virtual environment is one.
    python = args.python or ("python3" if args.container else sys.executable)
    if args.container:  # the interpreter in it cannot be asked from here
        python_path: tuple[str, ...] = ()
    else:
        python = os.path.abspath(python) if os.sep in python else python
        python_path = code.python_path(python)
    folder = RunFolder(run_dir).launch
    number = _next_number(folder)
    if args.snapshot:
        python_path = (
            str(folder / f"code{number}"),
            *(path for path in python_path if path != str(code.PACKAGE.parent)),
        )
    expected = str(folder / f"code{number}/griffin") if args.snapshot else "" if args.container else str(code.PACKAGE)
    files = JobFiles(
        run_dir=run_dir,
        script=folder / f"job{number}.sbatch",
        config=folder / f"config{number}.toml",
        working=working,
        python=python,
        python_path=python_path,
        setup=folder / f"setup{number}.sh" if args.setup else None,
        init=init,
        code=expected,
    )
    script = render(job, files)
    for local in NODE_LOCAL:
        if run_dir.is_relative_to(local) or run_dir.resolve().is_relative_to(local):
            _say(f"warning: --run-dir {run_dir}: is below {local}, which may be local to each node")
            break

    folder.mkdir(parents=True, exist_ok=True)
    if args.container and config.data.cache:  # mounted folders must exist
        Path(config.data.cache).mkdir(parents=True, exist_ok=True)
    if args.snapshot:
        code.write_snapshot(folder / f"code{number}")
    code.write_version(folder / f"code{number}.json")
    if args.setup:
        _write_new(folder / f"setup{number}.sh", args.setup.read_text(encoding="utf-8"))
    _write_new(files.config, to_toml(config))
    _write_new(files.script, script)
    if not args.submit:
        print(script)
        print(
            f"griffin: to submit it{f' {args.chain} times' * (args.chain > 1)}: sbatch {files.script}", file=sys.stderr
        )
        return 0
    for _ in range(args.chain):
        print(f"Submitted job {_submit(files.script)}: {files.script}")
    return 0


def _data_folders(config: Config) -> list[Path]:
    """Return the folders of the data, and of the cache of their indexes."""
    folders = [Path(info.prefix).absolute().parent for info in read_data(config.data)]
    return folders + ([Path(config.data.cache).absolute()] if config.data.cache else [])


def _next_number(folder: Path) -> str:
    """Return the first suffix, "", "-2", "-3" and so on, with which a job's files have new names in the folder."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    number, suffix = 1, ""
    while there & {f"{name}{suffix}{kind}" for name, kind in FILES}:
        number += 1
        suffix = f"-{number}"
    return suffix


def _write_new(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def _submit(script: Path) -> str:
    """Submit a script and return the job's number. Raises ValueError with SLURM's message if it refuses the job."""
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"sbatch {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def run_local(args: argparse.Namespace) -> int:
    """Train on this machine, restart after failures, and return the last exit code."""
    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts {args.max_restarts}: must be at least 0")
    if discover_ranks(args.ranks) is not None:
        raise ValueError("griffin launch local starts ranks itself: start it without torchrun, srun or mpiexec")
    if args.run_dir is None:  # the same one for all starts
        args.run_dir = default_run_folder(args.config, load_run_config(args))
    from griffin.trainer.checkpoint.unreadable import why_unreadable

    checkpoints = RunFolder(args.run_dir).checkpoints
    start = start_local(args)
    failures, best = 0, _newest(checkpoints)[0]
    while True:
        exit_code = start()
        if exit_code in ENDS:
            return exit_code
        newest, folder = _newest(checkpoints)
        is_newer = newest is not None and (best is None or newest > best)  # a run can go back to an earlier one
        failures, best = (1, newest) if is_newer else (failures + 1, best)
        at = "no checkpoint" if newest is None else f"the checkpoint of step {newest}"
        if folder is not None and (why := why_unreadable(args.run_dir, folder)):
            _say(f"the newest checkpoint cannot be read back, and restarts do not mend it: {folder.name} {why}")
            _say(f"to go on from the one before it, rename {folder} to {folder.name}.damaged")
        if failures > args.max_restarts:
            _say(f"failed {failures} times in a row with {at} as the newest: not tried again")
            return exit_code
        _say(f"failed with exit code {exit_code}: starting again from {at}")


def _newest(checkpoints: Path) -> tuple[int, Path] | tuple[None, None]:
    from griffin.trainer.checkpoint.steps import steps

    found = steps(checkpoints)
    return found[-1] if found else (None, None)


def _say(text: str) -> None:
    print(f"griffin: {text}", file=sys.stderr, flush=True)

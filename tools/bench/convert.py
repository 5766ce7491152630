"""`griffin bench convert`: convert weights to a checkpoint and export them, beside a plain copy of the file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from griffin.parallel.config import ModelConfig
from griffin.tools.bench.checkpoint import disk
from griffin.tools.common import safetensors_files
from griffin.tools.common.arguments import MOST_WORKERS, add_workers
from griffin.trainer.checkpoint.arrays import CHUNK_BYTES
from griffin.trainer.settings.presets import preset

GB = 10**9
SPACE = 4  # models on the disk at a time: the source, a checkpoint, an export and a copy


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "convert",
        help="converting and exporting weights of transformers, beside a plain copy",
        description="Time `griffin convert hf`, `griffin export hf` and a copy of the file, in turn, on one disk, for "
        "a model of random bfloat16 bits in transformers' format; all sync their files. Every exported tensor is "
        "compared with the original bit by bit before anything is timed.",
    )
    parser.add_argument("--model", default="recurrentgemma-2b", metavar="PRESET", help="default: recurrentgemma-2b")
    parser.add_argument("--blocks", type=int, default=5, metavar="N", help="number of its blocks to use (default: 5)")
    parser.add_argument("--vocabulary", type=int, default=32_000, metavar="N", help="default: 32000")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder on the disk to measure (default: this one)",
    )
    add_workers(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from griffin.tools.weights.hf.names import transformers_settings
    from griffin.tools.weights.imported import model_tensors

    for setting in ("blocks", "vocabulary", "rounds"):
        if getattr(args, setting) < 1:
            raise ValueError(f"--{setting} {getattr(args, setting)}: must be at least 1")
    if not args.folder.is_dir():
        raise ValueError(f"--folder {args.folder}: must be a folder")
    model = preset(args.model)
    if args.blocks > model.blocks:
        raise ValueError(f"--blocks {args.blocks}: must be at most the {model.blocks} of {args.model}")
    model = dataclasses.replace(model, pattern=model.pattern[: args.blocks], vocabulary=args.vocabulary)
    transformers_settings(model)  # raises before any long work
    size = 2 * sum(tensor.elements for tensor in model_tensors(model))
    free = shutil.disk_usage(args.folder).free
    if free < SPACE * size:
        raise ValueError(
            f"--folder {args.folder}: {free / GB:.2f} GB are free; must be at least {SPACE * size / GB:.2f} GB, "
            f"{SPACE} times the weights"
        )
    _print_heading(args, size)
    with tempfile.TemporaryDirectory(prefix="griffin-bench-", dir=args.folder) as scratch:
        measure(model, Path(scratch), size, args.rounds, args.workers)
    return 0


def _print_heading(args: argparse.Namespace, size: int) -> None:
    from griffin.launch.local import cores
    from griffin.tools.bench.machine import processor

    workers = args.workers or min(cores(), MOST_WORKERS)
    print(
        f"{time.strftime('%Y-%m-%d')}; {processor()}, {cores()} cores, load average {os.getloadavg()[0]:.1f}; "
        f"{disk(args.folder)}; python {platform.python_version()}, numpy {version('numpy')}\n"
        f"{args.blocks} blocks of {args.model}, vocabulary {args.vocabulary}: bfloat16, {size:,} bytes "
        f"({size / GB:.2f} GB); {workers} worker{'s' * (workers > 1)}, whose start is included in the time\n"
        f"files that are read were written just before; medians of {args.rounds} rounds after one that is left out",
        flush=True,
    )


def measure(model: ModelConfig, folder: Path, size: int, rounds: int, workers: int | None) -> None:
    """Check a round trip in `folder` against its source, then time each direction and a copy, and print."""
    from griffin.tools.common.workers import start_workers
    from griffin.tools.weights.hf.folder import WEIGHTS
    from griffin.tools.weights.hf.read import convert_transformers
    from griffin.tools.weights.hf.write import export_transformers

    source, step, back, copy = (folder / name for name in ("source", "step", "back", "copy"))
    write_source(source, model)

    def convert() -> None:
        with start_workers(workers, MOST_WORKERS) as pool:
            if pool:
                convert_transformers(source, step, pool)

    def export() -> None:
        with start_workers(workers, MOST_WORKERS) as pool:
            if pool:
                export_transformers(step, back, pool, shard_bytes=2 * size)

    def plain() -> None:
        shutil.copyfile(source / WEIGHTS, copy)
        with open(copy, "r+b") as file:
            os.fsync(file.fileno())

    sides: dict[str, tuple[Path, Callable[[], None]]] = {
        "convert hf": (step, convert),
        "export hf": (back, export),
        "copy": (copy, plain),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for target, _ in sides.values():
            _remove(target)
        for side, (_, work) in sides.items():
            os.sync()
            begun = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                work()
            seconds[side].append(time.perf_counter() - begun)
        if number == 0:
            require_equal(source / WEIGHTS, back / WEIGHTS)
    _report(size, {side: values[1:] for side, values in seconds.items()})


def _report(size: int, seconds: dict[str, list[float]]) -> None:
    median = {side: statistics.median(values) for side, values in seconds.items()}
    for side, value in median.items():
        print(f"{side:<12} {1000 * value:9.1f} ms {size / 1e6 / value:8.0f} MB/s")
    for side in seconds:
        if side != "copy":
            shares = sorted(copied / ours for ours, copied in zip(seconds[side], seconds["copy"], strict=True))
            print(
                f"{side:<12} ratio to copy {median['copy'] / median[side]:6.2f}    "
                f"(rounds: {shares[0]:.2f} to {shares[-1]:.2f})",
                flush=True,
            )


def write_source(folder: Path, model: ModelConfig) -> None:
    """Write a transformers folder of random bits."""
    from griffin.tools.checkpoints.auxiliary_files import CONFIG
    from griffin.tools.weights.hf.config import MODEL_TYPE
    from griffin.tools.weights.hf.folder import WEIGHTS
    from griffin.tools.weights.hf.names import transformers_axes, transformers_name, transformers_settings
    from griffin.tools.weights.imported import model_tensors

    shapes = {
        transformers_name(tensor.name): transformers_axes(tensor.name, len(tensor.shape)).foreign_shape(tensor.shape)
        for tensor in model_tensors(model)
    }
    header, entries = safetensors_files.lay_out((name, "bfloat16", shape) for name, shape in shapes.items())
    folder.mkdir()
    path = folder / WEIGHTS
    safetensors_files.create_file(path, header, len(header) + sum(entry.nbytes for entry in entries))
    generator = np.random.default_rng(0)
    for entry in entries:
        safetensors_files.write_values(path, [(entry.offset, np.frombuffer(generator.bytes(entry.nbytes), np.uint8))])
    settings = {"model_type": MODEL_TYPE} | transformers_settings(model)
    (folder / CONFIG).write_text(json.dumps(settings))


def require_equal(a: Path, b: Path) -> None:
    """Raise RuntimeError unless two files hold the same tensors bit by bit."""
    entries, others = safetensors_files.read_entries(a), safetensors_files.read_entries(b)
    equal = entries.keys() == others.keys()
    for name, entry in entries.items():
        other = others.get(name, entry)
        equal &= (entry.dtype, entry.shape) == (other.dtype, other.shape)
        for first in range(0, entry.nbytes if equal else 0, CHUNK_BYTES):
            count = min(CHUNK_BYTES, entry.nbytes - first)
            values = safetensors_files.read_bytes(a, entry.offset + first, count)
            equal &= np.array_equal(values, safetensors_files.read_bytes(b, other.offset + first, count))
    if not equal:
        raise RuntimeError("the exported tensors differ from the converted ones; nothing was timed")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

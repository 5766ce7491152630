"""Settings of `griffin bench kernels`, from the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from griffin.tools.common.arguments import add_dtype

if TYPE_CHECKING:
    from griffin.tools.bench.kernels.rank_operations import RankShape
    from griffin.tools.bench.kernels.recurrences import Shape

DTYPES = ("bfloat16", "float32")
COPY_BYTES = 2**30
PRODUCT_SIZE = 8192
RANK_STEPS, RANK_BATCH = 2048, 4  # the micro-batch of a model's rank


@dataclass(frozen=True, kw_only=True)
class Settings:
    widths: tuple[int, ...]  # R
    lengths: tuple[int, ...]  # T
    batches: tuple[int, ...]  # B
    ranks: tuple[RankShape, ...]
    dtype: str
    repeats: int
    chunk: int | None
    peers: bool
    copy_bytes: int = COPY_BYTES
    product_size: int = PRODUCT_SIZE

    def shapes(self) -> list[Shape]:
        from griffin.tools.bench.kernels.recurrences import Shape

        return [Shape(R, T, B) for R in self.widths for T in self.lengths for B in self.batches]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    widths = "512,1024,2048,4096,8192"
    parser.add_argument("--widths", default=widths, metavar="R,...", help=f"channels (default: {widths})")
    parser.add_argument("--lengths", default="2048,8192,32768", metavar="T,...", help="default: 2048,8192,32768")
    parser.add_argument("--batches", default="1,8", metavar="B,...", help="sequences (default: 1,8)")
    models = "griffin-14b/4,recurrentgemma-2b/1"
    parser.add_argument(
        "--models", default=models, metavar="MODEL/T,...", help=f"presets, each at a tensor size (default: {models})"
    )
    add_dtype(parser, "dtype of the inputs (default: bfloat16)", "bfloat16")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed rounds (default: 20)")
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="steps per chunk, 0 for a sequential scan (default: chosen by shape)"
    )
    parser.add_argument("--no-peers", action="store_true", help="measure only this project's kernels")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot shares of the bandwidth to a new file")


def read(args: argparse.Namespace) -> Settings:
    """Return the settings of the command line. Raises ValueError for invalid ones."""
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: accepted: {', '.join(DTYPES)}")
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: must be at least 1")
    if args.chunk is not None and args.chunk < 0:
        raise ValueError(f"--chunk {args.chunk}: must be a number of steps, or 0 for a sequential scan")
    return Settings(
        widths=_numbers("--widths", args.widths),
        lengths=_numbers("--lengths", args.lengths),
        batches=_numbers("--batches", args.batches),
        ranks=tuple(_rank(word) for word in dict.fromkeys(args.models.split(","))),
        dtype=args.dtype,
        repeats=args.repeats,
        chunk=args.chunk,
        peers=not args.no_peers,
    )


def _numbers(setting: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise ValueError(f"{setting} {text}: must be numbers of at least 1, separated by commas")
    return numbers


def _rank(text: str) -> RankShape:
    """Return the rank that MODEL/T names."""
    from griffin.tools.bench.kernels.rank_operations import RankShape
    from griffin.trainer.settings.presets import PRESETS

    name, _, size = text.partition("/")
    if name not in PRESETS or not size.isdecimal() or int(size) < 1:
        raise ValueError(f"--models {text}: must be presets with tensor sizes, such as griffin-14b/4")
    model, tensor = PRESETS[name], int(size)
    shared = {
        "heads": model.heads,
        "gate_blocks": model.gate_blocks,
        "MLP width": model.mlp_width,
        "vocabulary": model.padded_vocabulary,
    }
    for what, number in shared.items():
        if number % tensor:
            raise ValueError(f"--models {text}: {tensor} ranks cannot share {what} {number}")
    return RankShape(name=name, model=model, tensor=tensor, steps=RANK_STEPS, batch=RANK_BATCH)

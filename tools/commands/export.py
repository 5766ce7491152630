"""`griffin export`: export a checkpoint's weights for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from griffin.tools.common.arguments import (
    MOST_WORKERS,
    NEWEST_HELP,
    add_command,
    add_dtype,
    add_target,
    add_workers,
)

GB = 10**9  # as in transformers


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("export", help="export a checkpoint's weights for other programs")
    commands = parser.add_subparsers(required=True, metavar="FORMAT")
    text = "export a folder that transformers loads as RecurrentGemma: config.json, safetensors and tokenizer"
    command = add_command(commands, "hf", _hf, text)
    command.add_argument("source", metavar="SRC", type=Path, help=NEWEST_HELP)
    add_target(command, "folder to create; must not exist")
    command.add_argument("--shard-size", type=float, default=5, metavar="GB", help="largest file size (default: 5)")
    add_dtype(command, "dtype of all weights, rounded from the master weights if there are any (default: as stored)")
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="take tokenizer files, generation_config.json, and the token ids in config.json from FOLDER (default: the "
        "files that SRC was converted with, or the tokenizer of its training data)",
    )
    add_workers(command)


def _hf(args: argparse.Namespace) -> None:
    from griffin.tools.common.workers import start_workers
    from griffin.tools.weights.hf.write import export_transformers

    if not args.shard_size > 0:
        raise ValueError(f"--shard-size {args.shard_size:g}: must be above 0")
    with start_workers(args.workers, MOST_WORKERS) as workers:
        if workers:
            export_transformers(
                args.source,
                args.target,
                workers,
                shard_bytes=int(min(args.shard_size * GB, 2**62)),
                dtype=args.dtype,
                tokenizer=args.tokenizer,
            )

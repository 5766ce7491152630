"""`griffin convert`: checkpoints from published weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from griffin.tools.common.arguments import MOST_WORKERS, add_dtype, add_format, add_target, add_workers

MOST_TORCH_WORKERS = 2  # each has PyTorch in memory as well


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("convert", help="make a checkpoint from published weights")
    commands = parser.add_subparsers(required=True, metavar="FORMAT")

    text = (
        "make a checkpoint of a transformers folder of RecurrentGemma: config.json, and model.safetensors or its shards"
    )
    command = add_format(commands, "hf", _hf, text)
    command.add_argument("source", metavar="SRC", type=Path, help="folder that transformers saved or downloaded")
    add_target(command, "step folder to make; must not exist")
    add_dtype(command, "of all weights (default: each as it is stored)")
    add_workers(command)

    text = "make a checkpoint of DeepMind's published weights: its PyTorch file, or its JAX code's orbax folder"
    command = add_format(commands, "deepmind", _deepmind, text)
    command.add_argument(
        "source", metavar="SRC", type=Path, help="a .pt file, or a folder (pip install 'griffin-megatron[orbax]')"
    )
    add_target(command, "step folder to make; must not exist")
    command.add_argument(
        "--window",
        type=int,
        default=2048,
        metavar="W",
        help="attention_window_size of DeepMind's config (default: 2048). Its code sees W + 1 keys, the query's own "
        "included: model.window is W + 1",
    )
    command.add_argument(
        "--soft-cap", type=float, default=30.0, metavar="C", help="of the logits; 0 is off (default: 30)"
    )
    command.add_argument(
        "--no-scale-embedding",
        action="store_true",
        help="the model does not multiply embeddings by the square root of its width",
    )
    command.add_argument(
        "--vocabulary",
        type=int,
        metavar="V",
        help="rows of the table that are tokens (default: all, but 256000 of 256128)",
    )
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer to take along: a SentencePiece model, a tokenizer.json, or a folder",
    )
    add_dtype(command, "of all weights (default: each as it is stored)")
    add_workers(command, "; a folder is read by one")


def _hf(args: argparse.Namespace) -> None:
    from griffin.tools.common.workers import start_workers
    from griffin.tools.weights.hf.read import convert_transformers

    with start_workers(args.workers, MOST_WORKERS) as workers:
        if workers:
            convert_transformers(args.source, args.target, workers, dtype=args.dtype)


def _deepmind(args: argparse.Namespace) -> None:
    from griffin.tools.common.workers import start_workers
    from griffin.tools.weights.deepmind.names import ModelOptions
    from griffin.tools.weights.deepmind.read import convert_deepmind

    if not args.source.exists():
        raise ValueError(f"{args.source}: must be a file of torch.save, or an orbax folder")
    if args.source.is_dir() and args.workers not in (None, 1):
        raise ValueError(f"--workers {args.workers}: must be 1 for a folder: orbax reads each array as a whole")
    options = ModelOptions(
        window=args.window,
        soft_cap=args.soft_cap,
        scale_embedding=not args.no_scale_embedding,
        vocabulary=args.vocabulary,
    )
    with start_workers(1 if args.source.is_dir() else args.workers, MOST_TORCH_WORKERS) as workers:
        if workers:
            convert_deepmind(
                args.source,
                args.target,
                workers,
                options,
                dtype=args.dtype,
                tokenizer=args.tokenizer,
            )

"""`griffin convert`: convert published weights to checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from griffin.tools.common.arguments import MOST_WORKERS, add_command, add_dtype, add_target, add_workers

MOST_TORCH_WORKERS = 2  # each also holds PyTorch in memory


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("convert", help="convert published weights to a checkpoint")
    commands = parser.add_subparsers(required=True, metavar="FORMAT")

    text = (
        "convert a transformers folder of RecurrentGemma to a checkpoint: config.json, and model.safetensors or shards"
    )
    command = add_command(commands, "hf", _hf, text)
    command.add_argument("source", metavar="SRC", type=Path, help="folder saved or downloaded by transformers")
    add_target(command, "step folder to create; must not exist")
    add_dtype(command, "dtype of all weights (default: each as it is stored)")
    add_workers(command)

    text = "convert DeepMind's published weights to a checkpoint: the PyTorch file, or the orbax folder of the JAX code"
    command = add_command(commands, "deepmind", _deepmind, text)
    command.add_argument(
        "source", metavar="SRC", type=Path, help="a .pt file, or a folder (pip install 'griffin-megatron[orbax]')"
    )
    add_target(command, "step folder to create; must not exist")
    command.add_argument(
        "--window",
        type=int,
        default=2048,
        metavar="W",
        help="attention_window_size of DeepMind's config (default: 2048). Its code attends to W + 1 keys, including "
        "the query's own: model.window becomes W + 1",
    )
    command.add_argument(
        "--soft-cap", type=float, default=30.0, metavar="C", help="soft cap of the logits; 0 is off (default: 30)"
    )
    command.add_argument(
        "--no-scale-embedding",
        action="store_true",
        help="do not multiply embeddings by the square root of the width",
    )
    command.add_argument(
        "--vocabulary",
        type=int,
        metavar="V",
        help="embedding rows that are tokens (default: all, but 256000 of 256128)",
    )
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer to keep in the checkpoint: a SentencePiece model, a tokenizer.json, or a folder",
    )
    add_dtype(command, "dtype of all weights (default: each as it is stored)")
    add_workers(command, "; an orbax folder is read by one")


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
        raise ValueError(f"--workers {args.workers}: must be 1 for an orbax folder: orbax reads arrays as a whole")
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

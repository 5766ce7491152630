"""`griffin generate`: continue text with a checkpoint's model."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.tools.common.arguments import NEWEST_HELP, add_dtype

if TYPE_CHECKING:
    from griffin.parallel.world.ranks import Ranks
    from griffin.tools.inference.model import InferenceCheckpoint
    from griffin.tools.inference.prompts import PromptTokenizer


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue text with a checkpoint's model",
        description="Continue prompts with CHECKPOINT's model. Memory does not grow with the text, except with global "
        "attention. Under torchrun, srun or mpiexec this process is one of the tensor ranks.",
    )
    add_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="print what follows it")
    prompts.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help='prompts, one per line, or a .jsonl file of objects with a "prompt"; prints one JSON object per prompt',
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="of each answer, at most (default: 128)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="sampling temperature; 0, the default, is greedy"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens only")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that sum to probability P",
    )
    parser.add_argument("--seed", type=int, default=0, help="sampling seed (default: 0)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding step with torch.compile, which takes seconds (CPUs need a C++ compiler; --tensor 1)",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts per batch (default: 16)")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="as for `griffin data build` (default: that of the checkpoint or its data)"
    )
    parser.add_argument("--eod", metavar="TOKEN", help="the tokenizer's end-of-document token, if its name is unusual")
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="do not begin prompts with a converted model's bos_token_id",
    )
    parser.set_defaults(run=run)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments CHECKPOINT, --tensor and --dtype."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=NEWEST_HELP)
    parser.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor-parallel ranks (default: 1)")
    add_dtype(parser, "compute dtype (default: that of the weights)")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from griffin.tools.inference.model import InferenceCheckpoint, check_compiled, run_on_ranks
    from griffin.tools.inference.prompts import find_prompt_tokenizer, read_prompts
    from griffin.tools.inference.sampling import Sampling

    for setting in ("max_tokens", "batch_size"):
        if getattr(args, setting) < 1:
            raise ValueError(f"--{setting.replace('_', '-')} {getattr(args, setting)}: must be at least 1")
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    texts = {"--prompt": args.prompt} if args.batch is None else read_prompts(args.batch)
    checkpoint = InferenceCheckpoint.find(args.checkpoint, args.tensor, args.dtype)
    if args.compile:
        check_compiled(args.tensor)
    tokenizer = find_prompt_tokenizer(checkpoint.folder, checkpoint.manifest, args.tokenizer, args.eod)
    if args.no_bos:
        tokenizer = replace(tokenizer, bos=None)
    prompts = [tokenizer.encode(text, checkpoint.manifest.model.vocabulary, where) for where, text in texts.items()]
    settings = {"batch": args.batch_size, "max_tokens": args.max_tokens, "stops": tokenizer.stops, "sampling": sampling}
    arguments = (checkpoint, tokenizer, list(texts.values()), prompts, settings, args.batch is not None, args.compile)
    return run_on_ranks(generate_rank, checkpoint.tensor, arguments)


def generate_rank(
    ranks: Ranks | None,
    checkpoint: InferenceCheckpoint,
    tokenizer: PromptTokenizer,
    texts: list[str],
    prompts: list[list[int]],
    settings: dict[str, Any],
    as_json: bool,
    compiled: bool,
) -> None:
    """Generate on one rank; rank 0 prints."""
    from griffin.tools.inference.model import open_model
    from griffin.tools.inference.sampling import generate_all

    with open_model(checkpoint, ranks, compiled=compiled) as model:
        begun, count = time.monotonic(), 0
        for text, prompt, ids in zip(texts, prompts, generate_all(model, prompts, **settings), strict=True):
            if not model.grid.is_first_rank:
                continue
            found = tokenizer.decode(prompt, ids)
            if as_json:
                counts = {"prompt_tokens": len(prompt), "tokens": len(ids), "stopped": ids[-1] in tokenizer.stops}
                found = json.dumps({"prompt": text, "text": found} | counts, ensure_ascii=False)
            print(found, flush=True)
            count += len(ids)
        seconds = time.monotonic() - begun
        if model.grid.is_first_rank:
            print(f"{count:,} tokens in {seconds:.1f} s ({count / seconds:,.1f} tokens/s)", file=sys.stderr)

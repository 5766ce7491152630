"""`griffin generate`: let a checkpoint's model continue text."""

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
        description="Continue prompts with CHECKPOINT's model, in memory that does not grow with the text (but with "
        "global attention). Under torchrun, srun or mpiexec this process is one of the tensor ranks.",
    )
    add_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="print what follows it")
    prompts.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help='prompts, one a line, or in a .jsonl file objects with a "prompt"; prints JSON, one object a line',
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of each answer (default: 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default, takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that come to P together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile what computes a token first, which takes seconds (on CPUs with a C++ compiler; --tensor 1)",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at a time (default: 16)")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="as of `griffin data build` (default: that of the checkpoint, or its data)"
    )
    parser.add_argument(
        "--eod", metavar="TOKEN", help="the tokenizer's end-of-document token, where its name is unusual"
    )
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="do not begin prompts with the token that a converted model's files name for that",
    )
    parser.set_defaults(run=run)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `griffin.tools.inference.model.InferenceCheckpoint.find` reads."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=NEWEST_HELP)
    parser.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor-parallel ranks (default: 1)")
    add_dtype(parser, "that the model computes in (default: that of its weights)")


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
    checkpoint = InferenceCheckpoint.find(args)
    if args.compile:
        check_compiled(args.tensor)
    language = find_prompt_tokenizer(checkpoint.folder, checkpoint.manifest, args.tokenizer, args.eod)
    if args.no_bos:
        language = replace(language, bos=None)
    prompts = [language.encode(text, checkpoint.manifest.model.vocabulary, where) for where, text in texts.items()]
    settings = {"batch": args.batch_size, "max_tokens": args.max_tokens, "stops": language.stops, "sampling": sampling}
    answering = (checkpoint, language, list(texts.values()), prompts, settings, args.batch is not None, args.compile)
    return run_on_ranks(answer, checkpoint.tensor, answering)


def answer(
    ranks: Ranks | None,
    checkpoint: InferenceCheckpoint,
    language: PromptTokenizer,
    texts: list[str],
    prompts: list[list[int]],
    settings: dict[str, Any],
    as_json: bool,
    compiled: bool,
) -> None:
    """What each rank does; rank 0 prints."""
    from griffin.tools.inference.model import open_model
    from griffin.tools.inference.sampling import generate_all

    with open_model(checkpoint, ranks, compiled=compiled) as model:
        begun, count = time.monotonic(), 0
        for text, prompt, ids in zip(texts, prompts, generate_all(model, prompts, **settings), strict=True):
            if not model.grid.is_first_rank:
                continue
            found = language.decode(prompt, ids)
            if as_json:
                counts = {"prompt_tokens": len(prompt), "tokens": len(ids), "stopped": ids[-1] in language.stops}
                found = json.dumps({"prompt": text, "text": found} | counts, ensure_ascii=False)
            print(found, flush=True)
            count += len(ids)
        seconds = time.monotonic() - begun
        if model.grid.is_first_rank:
            print(f"{count:,} tokens in {seconds:.1f} s ({count / seconds:,.1f} tokens/s)", file=sys.stderr)

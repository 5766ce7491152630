"""`griffin bench generate`: generated tokens per second, beside transformers' RecurrentGemma."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig, ParallelConfig

if TYPE_CHECKING:
    from griffin.tools.inference.model import LoadedModel

HEAD_DIM = 64


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "generate",
        help="generation, beside transformers' RecurrentGemma",
        description="Time processing prompts and generating --tokens tokens, beside transformers' `generate`: one "
        "process on CPUs, the same weights and prompts, float32, greedy. The generated tokens are compared before "
        "anything is timed.",
    )
    parser.add_argument("--width", type=int, default=256, metavar="D", help="model and recurrent width (default: 256)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="B", help="default: 1 16")
    parser.add_argument("--prompt", type=int, default=64, metavar="T", help="tokens of each prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="new tokens of each (default: 512)")
    parser.add_argument("--window", type=int, default=1024, metavar="W", help="attention window (default: 1024)")
    parser.add_argument(
        "--compile", action="store_true", help="as for `griffin generate`; the compilation itself is not timed"
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="timed rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for setting in ("width", "batch", "prompt", "tokens", "window", "repeats", "threads"):
        values = getattr(args, setting)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise ValueError(f"--{setting} {value}: must be at least 1")
    if args.width % HEAD_DIM:
        raise ValueError(f"--width {args.width}: must be a multiple of {HEAD_DIM}, the width of a head")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # compare on CPUs, even if there are GPUs
    try:
        import transformers
    except ImportError:
        raise ValueError("bench generate: needs transformers; pip install 'griffin-megatron[dev]'") from None
    import torch

    from griffin.parallel.sharding import initialize
    from griffin.parallel.stage import build_stages
    from griffin.parallel.world.grid import single_rank_grid
    from griffin.tools.bench.machine import versions
    from griffin.tools.inference.model import LoadedModel, check_compiled

    if args.compile:
        check_compiled(1)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    config = ModelConfig(
        pattern=(RECURRENT, RECURRENT, ATTENTION) * 2,
        width=args.width,
        recurrent_width=args.width,
        heads=args.width // HEAD_DIM,
        head_dim=HEAD_DIM,
        gate_blocks=args.width // HEAD_DIM,
        window=args.window,
        vocabulary=512,
        scale_embedding=True,
        logit_soft_cap=30.0,
    )
    print(
        f"{versions(args.threads)}\n"
        f"float32, greedy, prompts of {args.prompt} and {args.tokens} new tokens, D = R = {args.width}, vocabulary "
        f"{config.vocabulary}, window {args.window}, blocks {', '.join(config.pattern)}"
        f"{'; a step compiled' if args.compile else ''}"
    )
    with single_rank_grid() as grid:
        stages = build_stages(config, ParallelConfig(), grid, dtype=torch.float32, sequence=args.prompt)
        initialize(stages, grid, seed=0)
        model = LoadedModel(stages[0].eval().requires_grad_(False), grid, config, args.compile)
        peer = _peer(model)
        for batch in args.batch:
            _compare(model, peer, batch, args)
    return 0


def _peer(model: LoadedModel) -> Any:
    """Build transformers' model with the same weights and no end-of-sequence token."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    from griffin.parallel.sharding import gather
    from griffin.tools.weights.hf.names import to_transformers, transformers_settings

    settings = RecurrentGemmaConfig(
        **transformers_settings(model.config), eos_token_id=None, pad_token_id=None, bos_token_id=None
    )
    peer = RecurrentGemmaForCausalLM(settings).float().eval()
    loaded = peer.load_state_dict(to_transformers(gather([model.stage], model.grid)), strict=False)
    assert loaded.missing_keys == ["lm_head.weight"], loaded  # tied
    assert not loaded.unexpected_keys, loaded
    return peer


def _compare(model: LoadedModel, peer: Any, batch: int, args: argparse.Namespace) -> None:
    """Time both in alternation, so that changes of the machine's speed affect both, and print medians."""
    import torch

    from griffin.tools.inference.sampling import Sampling, generate

    prompts = torch.randint(
        1, model.config.vocabulary, (batch, args.prompt), generator=torch.Generator().manual_seed(1)
    )

    def ours() -> list[list[int]]:
        return generate(model, prompts.tolist(), max_tokens=args.tokens, sampling=Sampling())

    def theirs() -> list[list[int]]:
        found = peer.generate(prompts, max_new_tokens=args.tokens, do_sample=False)
        return found[:, args.prompt :].tolist()

    if ours() != theirs():
        raise RuntimeError("the tokens differ from transformers'; nothing was timed")
    seconds: dict[str, list[float]] = {"griffin": [], "transformers": []}
    for _ in range(args.repeats):
        for name, function in (("griffin", ours), ("transformers", theirs)):
            begun = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"batch {batch:<4} {name:<13} {value:7.3f} s {batch * args.tokens / value:10,.0f} tokens/s")
    ratios = sorted(theirs / ours for ours, theirs in zip(*seconds.values(), strict=True))
    print(
        f"batch {batch:<4} ratio         {median['transformers'] / median['griffin']:7.2f}     "
        f"(rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )

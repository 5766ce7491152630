"""`griffin bench step`: a training step and the recurrent mixer, beside transformers' RecurrentGemma."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from griffin.tools.bench.machine import versions

if TYPE_CHECKING:
    from torch import Tensor

    from griffin.parallel.config import ModelConfig
    from griffin.parallel.world.grid import Grid


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "step",
        help="a training step and the recurrent mixer, beside transformers' RecurrentGemma",
        description="Time a training step (forward, backward, clipping, AdamW) and the recurrent mixer alone (forward "
        "and backward), beside transformers' RecurrentGemma: one process on CPUs, the same weights and tokens, "
        "float32. The step's loss and the mixer's output and input gradient are compared before anything is timed.",
    )
    parser.add_argument("--sequence", type=int, default=1024, metavar="T", help="tokens per sequence (default: 1024)")
    parser.add_argument("--width", type=int, default=256, metavar="D", help="model and recurrent width (default: 256)")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="timed rounds (default: 15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for setting in ("sequence", "width", "repeats", "threads"):
        if getattr(args, setting) < 1:
            raise ValueError(f"--{setting} {getattr(args, setting)}: must be at least 1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # compare on CPUs, even if there are GPUs
    if args.width % 64:
        raise ValueError(f"--width {args.width}: must be a multiple of 64, the width of a head")
    try:
        import transformers
    except ImportError:
        raise ValueError("bench step: needs transformers; pip install 'griffin-megatron[dev]'") from None
    import torch

    from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig
    from griffin.parallel.world.grid import single_rank_grid

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    model = ModelConfig(
        pattern=(RECURRENT, RECURRENT, ATTENTION),
        width=args.width,
        recurrent_width=args.width,
        heads=args.width // 64,
        head_dim=64,
        gate_blocks=args.width // 64,
        window=args.sequence,
        vocabulary=512,
        scale_embedding=True,
        logit_soft_cap=30.0,
    )
    print(
        f"{versions(args.threads)}\n"
        f"float32, batch 1, sequence {args.sequence}, D = R = {args.width}, vocabulary {model.vocabulary}, "
        f"blocks {', '.join(model.pattern)}"
    )
    with single_rank_grid() as grid:
        steps, mixers = _steps(model, grid, args.sequence), _mixers(model, grid, args.sequence)
        _compare("training step", *steps, args)
        _compare("recurrent mixer", *mixers, args)
    return 0


def _compare(title: str, ours: Callable[[], object], theirs: Callable[[], object], args: argparse.Namespace) -> None:
    """Time both in alternation, so that changes of the machine's speed affect both, and print medians."""
    seconds: dict[str, list[float]] = {"griffin": [], "transformers": []}
    for _ in range(args.repeats + 2):  # two rounds to warm up
        for name, function in (("griffin", ours), ("transformers", theirs)):
            begun = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{title:<16} {name:<13} {1000 * value:8.1f} ms {args.sequence / value:10,.0f} tokens/s")
    ratios = sorted(theirs / ours for ours, theirs in zip(*(values[2:] for values in seconds.values()), strict=True))
    print(
        f"{title:<16} ratio         {median['transformers'] / median['griffin']:8.2f}     "
        f"(rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def _steps(model: ModelConfig, grid: Grid, sequence: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Build a training step of ours and one of transformers, with the same weights and tokens."""
    import torch
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    from griffin.parallel import sharding
    from griffin.tools.weights.hf.names import to_transformers, transformers_settings
    from griffin.trainer.settings.sections import Config, DataConfig, OptimizerConfig, TrainConfig
    from griffin.trainer.step import Training

    settings = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0)
    config = Config(
        model=model,
        data=DataConfig(sequence_length=sequence),
        optimizer=settings,
        train=TrainConfig(global_batch=1, micro_batch=1, dtype="float32"),
    )
    training = Training(config, grid)
    peer = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**transformers_settings(model))).float().train()
    loaded = peer.load_state_dict(to_transformers(sharding.gather(training.stages, grid)), strict=False)
    assert loaded.missing_keys == ["lm_head.weight"], loaded  # tied
    assert not loaded.unexpected_keys, loaded
    adam = torch.optim.AdamW(
        peer.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    tokens = torch.randint(1, model.vocabulary, (1, sequence + 1), generator=torch.Generator().manual_seed(1))
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:].contiguous(),
        "positions": torch.arange(sequence).unsqueeze(0),
        "loss_mask": torch.ones(1, sequence),
    }

    def ours() -> float:
        return training.step(iter([batch])).loss

    def theirs() -> float:
        adam.zero_grad(set_to_none=True)
        logits = peer(batch["tokens"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), settings.clip)
        adam.step()
        return loss.item()

    require_equal("loss", torch.tensor(ours()), torch.tensor(theirs()))
    return ours, theirs


def _mixers(model: ModelConfig, grid: Grid, sequence: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Build our recurrent mixer and transformers', forward and backward, with the same weights and input."""
    import torch
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    from griffin.parallel import sharding
    from griffin.parallel.config import ParallelConfig
    from griffin.parallel.context import Context, Documents, megatron_config
    from griffin.parallel.mixers.recurrent import RecurrentMixer
    from griffin.tools.weights.hf.names import to_transformers, transformers_settings

    megatron = megatron_config(model, ParallelConfig(), torch.float32, grid.device)
    name = "blocks.0.recurrent"
    mixer = RecurrentMixer(name, Context(model=model, grid=grid, megatron=megatron, device=grid.device))
    sharding.initialize([mixer], grid, seed=0)
    peer = RecurrentGemmaRecurrentBlock(RecurrentGemmaConfig(**transformers_settings(model)), 0)
    prefix = "model.layers.0.temporal_block."
    peer.load_state_dict(
        {key.removeprefix(prefix): value for key, value in to_transformers(sharding.gather([mixer], grid)).items()}
    )
    generator = torch.Generator().manual_seed(2)
    x, gradient = torch.randn(2, sequence, 1, model.width, generator=generator)
    positions = torch.arange(sequence).unsqueeze(0)

    def run(module: torch.nn.Module, x: torch.Tensor, gradient: torch.Tensor, *args: object) -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        x = x.requires_grad_()
        x.grad = None
        output = module(x, *args)
        output = output[0] if isinstance(output, tuple) else output  # transformers' also returns None
        output.backward(gradient)
        return output.detach()

    def ours() -> torch.Tensor:
        return run(mixer, x, gradient, Documents(positions))

    x_BTD, gradient_BTD = x.transpose(0, 1).contiguous(), gradient.transpose(0, 1).contiguous()

    def theirs() -> torch.Tensor:
        return run(peer, x_BTD, gradient_BTD, positions, torch.ones(1, sequence), False)

    require_equal("mixer's output", ours().transpose(0, 1), theirs())
    assert x.grad is not None
    assert x_BTD.grad is not None
    require_equal("mixer's input gradient", x.grad.transpose(0, 1), x_BTD.grad)
    return ours, theirs


def require_equal(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise RuntimeError unless both results agree to 1e-4; float32 sums in another order stay far below."""
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference < 1e-4:
        raise RuntimeError(f"the {name} differs from transformers' by {difference:.1e} of its size; nothing was timed")

"""The operators of one micro-batch on one rank, found without memory or GPUs: its stages run on meta tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from griffin.parallel import megatron_device
from griffin.parallel.layers.norm import RMSNorm
from griffin.parallel.mixers import MIXERS
from griffin.parallel.stage import Stage, build_stages
from griffin.parallel.world.grid import fake_grid
from griffin.tools.bench.count.recorder import Op, Recorder
from griffin.trainer.settings.sections import Config
from griffin.trainer.sharded_optimizer import wrap_in_ddp
from griffin.trainer.step import masked_loss


@dataclass(frozen=True, kw_only=True)
class RankCount:
    """Operators and bytes of one micro-batch on one rank."""

    ops: tuple[Op, ...]
    parameters: int
    largest_parameter: int  # elements of the rank's embedding table, 0 where it holds none
    blocks: tuple[int, ...]  # of each of its stages
    kept: dict[str, int]  # bytes of activations that the backward needs, by kind of module
    peak: int  # bytes, besides weights, gradients and the optimizer's state
    at_peak: tuple[tuple[int, str], ...]


def count_rank(config: Config, world: int, rank: int) -> RankCount:
    """Count a rank of the training of `config`, valid for `world` ranks, with the operators that it runs on GPUs."""
    layout = config.parallel
    recorder = Recorder()
    with fake_grid(layout, world, rank) as grid, megatron_device.on_meta():
        stages = build_stages(
            config.model,
            layout,
            grid,
            dtype=getattr(torch, config.train.dtype),
            sequence=config.data.sequence_length,
            recompute=config.train.recompute,
            kernels="triton",
            device=grid.device,
        )
        chunks = wrap_in_ddp(stages, overlap=False)
        for chunk in chunks:
            for buffer in chunk.buffers:
                recorder.memory.ignore(buffer.param_data)
                recorder.memory.ignore(buffer.grad_data)
        for stage, chunk in zip(stages, chunks, strict=True):
            recorder.watch(stage, _kinds(stage))
            _run(recorder, config, stage, chunk)
    tables = [stage.shared_embedding_or_output_weight() for stage in stages]
    return RankCount(
        ops=tuple(recorder.ops),
        parameters=sum(parameter.numel() for stage in stages for parameter in stage.parameters()),
        largest_parameter=max(0 if table is None else table.numel() for table in tables),
        blocks=tuple(len(stage.blocks) for stage in stages),
        kept=recorder.kept,
        peak=recorder.memory.peak,
        at_peak=tuple(recorder.memory.at_peak),
    )


def _run(recorder: Recorder, config: Config, stage: Stage, chunk: nn.Module) -> None:
    """Forward and backward of a stage for one micro-batch."""
    shape = (config.train.micro_batch, config.data.sequence_length)
    device = torch.device("meta")
    batch = {name: torch.empty(shape, dtype=torch.int64, device=device) for name in ("tokens", "labels", "positions")}
    mask = torch.empty(shape, dtype=torch.float32, device=device)
    if not stage.pre_process:
        steps = shape[1] // (config.parallel.tensor if stage.config.sequence_parallel else 1)
        dtype = getattr(torch, config.train.dtype)
        stage.set_input_tensor(
            [torch.empty(steps, shape[0], config.model.width, dtype=dtype, device=device, requires_grad=True)]
        )
    with recorder:
        recorder.phase = "forward"
        recorder.enter("loss")  # what belongs to no module of the stage
        with saved_tensors_hooks(recorder.keep, lambda tensor: tensor):
            output = chunk(batch)
            if stage.post_process:
                output = masked_loss(mask, output)[0]
        recorder.leave(output)
        recorder.phase = "backward"
        gradient = None if stage.post_process else torch.empty_like(output)
        torch.autograd.backward(output, grad_tensors=gradient)


def _kinds(stage: Stage) -> Callable[[str, nn.Module], str]:
    """A function of a module and its path in the stage: the name under which its operators are counted."""
    names = {described.load(): described.name for described in MIXERS.values()}

    def kind(path: str, module: nn.Module) -> str:
        if isinstance(module, RMSNorm):
            return "norms"
        block = re.match(r"blocks\.(\d+)\.(mixer|mlp)\b", path)
        if block is None:
            return {"embedding": "embedding", "logits": "logits"}.get(path, "residual sums")
        if block[2] == "mlp":
            return "MLP"
        return f"{names[type(stage.blocks[int(block[1])].mixer)]} mixer"  # type: ignore[index]

    return kind

"""Small models that are converted, and what one computes from its checkpoint on a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from griffin.parallel import sharding
from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.world.grid import rank_grid
from griffin.trainer.checkpoint.manifest import check
from griffin.trainer.checkpoint.state import ShardedState
from griffin.trainer.settings.sections import Config, DataConfig, OptimizerConfig, TrainConfig
from griffin.trainer.step import Training
from tests.layouts import main_gradient
from tests.transformers_models import tokens

FIVE_BLOCKS = ModelConfig(
    pattern=(RECURRENT, RECURRENT, ATTENTION, RECURRENT, RECURRENT),  # 5 blocks: not a multiple of 3
    width=32,
    recurrent_width=48,
    heads=4,
    head_dim=16,
    gate_blocks=4,
    window=12,
    vocabulary=200,
    scale_embedding=True,
    logit_soft_cap=30.0,
)

GRIFFIN = ModelConfig(
    pattern=(RECURRENT, ATTENTION, RECURRENT),
    width=32,
    recurrent_width=48,
    heads=2,
    head_dim=16,
    gate_blocks=2,
    window=12,
    vocabulary=200,
    scale_embedding=True,
    logit_soft_cap=30.0,
)

BATCH, SEQUENCE = 2, 40
LAYOUTS = {"1-rank": ParallelConfig(), "tp2": ParallelConfig(tensor=2), "pp2": ParallelConfig(pipeline=2)}


def batch(vocabulary: int) -> dict[str, torch.Tensor]:
    ids = tokens(vocabulary, SEQUENCE + 1, BATCH)
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:].contiguous(),
        "positions": torch.arange(SEQUENCE).expand(BATCH, -1).contiguous(),
        "loss_mask": torch.ones(BATCH, SEQUENCE),
    }


def compute(ranks: Any, layout: ParallelConfig, folder: Path) -> dict[str, Any]:
    """This rank's part of the logits, if it has one; the loss and all gradients."""
    manifest = check(folder)
    model = manifest.model
    config = Config(
        model=model,
        parallel=layout,
        data=DataConfig(sequence_length=SEQUENCE),
        optimizer=OptimizerConfig(warmup_steps=0, decay_steps=1),
        train=TrainConfig(steps=1, global_batch=BATCH, micro_batch=BATCH, dtype="float32"),
    )
    data = batch(model.vocabulary)
    with rank_grid(layout, ranks) as grid:
        training = Training(config, grid)
        ShardedState(training, grid).load(folder, manifest, everything=False)
        (stage,) = training.stages
        found = None
        with torch.no_grad():
            if not stage.pre_process:
                received = torch.empty(SEQUENCE, BATCH, model.width)
                dist.recv(received, src=0)
                stage.set_input_tensor([received])
            output = stage({name: value for name, value in data.items() if name != "labels"})
            if stage.post_process:
                found = output
            else:
                dist.send(output, dst=1)
        loss, _ = training.gradients(iter([data]))
        return {
            "logits": found,
            "loss": loss,
            "gradients": sharding.gather(training.stages, grid, main_gradient),
        }

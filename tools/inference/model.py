"""Load a checkpoint's model for inference, on tensor-parallel ranks."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from griffin.launch.discovery import discover, leave
from griffin.launch.local import run_local
from griffin.parallel.config import ModelConfig, ParallelConfig
from griffin.parallel.decode import Decoder
from griffin.parallel.stage import Stage, build_stages
from griffin.parallel.world.grid import Grid, rank_grid, single_rank_grid
from griffin.parallel.world.ranks import Ranks
from griffin.tools.checkpoints.rewrite import check_layout
from griffin.tools.common.workers import ended_by_sigterm
from griffin.trainer.checkpoint.arrays import MODEL
from griffin.trainer.checkpoint.manifest import Manifest, check
from griffin.trainer.checkpoint.steps import resolve
from griffin.trainer.checkpoint.weights import load_weights

COMPILERS = ("g++", "clang++")  # those that torch.compile looks for
PRELOAD = ("griffin.tools.inference.sampling",)


@dataclass(frozen=True)
class InferenceCheckpoint:
    """A complete step to load on `tensor` ranks, and the compute dtype. Pickled to the ranks."""

    folder: Path
    manifest: Manifest
    tensor: int
    dtype: str  # "float32", "float16" or "bfloat16"

    @classmethod
    def find(cls, path: Path, tensor: int, dtype: str | None) -> InferenceCheckpoint:
        """Find the step at `path`, or the newest complete one of the run there. `dtype` None is that of its weights.

        Raises CheckpointError if it is not complete, and ValueError if the model cannot be sharded over `tensor` ranks.
        """
        folder = resolve(path)
        manifest = check(folder)
        if tensor < 1:
            raise ValueError(f"--tensor {tensor}: must be at least 1")
        check_layout(manifest, ParallelConfig(tensor=tensor))
        return cls(folder, manifest, tensor, dtype or manifest.arrays[f"{MODEL}.embedding.weight"].dtype)


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, of which this rank holds its shard."""

    stage: Stage
    grid: Grid
    config: ModelConfig
    compiled: bool = False  # whether the decoding step is compiled, see `Decoder`

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.stage, compiled=self.compiled)

    def all_gather_logits(self, logits: Tensor) -> Tensor:
        """Gather this rank's shard of the logits to [..., vocabulary]. A collective of tensor ranks."""
        if self.grid.tensor_size > 1:
            parts = [torch.empty_like(logits) for _ in range(self.grid.tensor_size)]
            dist.all_gather(parts, logits.contiguous(), group=self.grid.tensor_group)
            logits = torch.cat(parts, dim=-1)
        return logits[..., : self.config.vocabulary]


@contextmanager
def open_model(
    checkpoint: InferenceCheckpoint, ranks: Ranks | None, *, compiled: bool = False
) -> Iterator[LoadedModel]:
    """Load the model on this rank. `ranks` is what `run_on_ranks` passes."""
    layout = ParallelConfig(tensor=checkpoint.tensor)
    config = checkpoint.manifest.model
    with single_rank_grid() if ranks is None else rank_grid(layout, ranks) as grid:
        stages = build_stages(config, layout, grid, dtype=getattr(torch, checkpoint.dtype), sequence=1)
        load_weights(stages, grid, checkpoint.folder, checkpoint.manifest)
        yield LoadedModel(stages[0].eval().requires_grad_(False), grid, config, compiled)


def check_compiled(tensor: int) -> None:
    """Raise ValueError if `Decoder(compiled=True)` cannot work."""
    if tensor > 1:
        raise ValueError(f"--compile: must be left out with --tensor {tensor}: collectives are not compiled")
    named = os.environ.get("CXX")
    if not torch.cuda.is_available() and not any(map(shutil.which, [named] if named else COMPILERS)):
        raise ValueError(f"--compile: needs a C++ compiler on CPUs; found no {named or ', '.join(COMPILERS)}")


def run_on_ranks(function: Callable[..., None], tensor: int, args: Sequence[Any]) -> int:
    """Call `function(ranks, *args)` on `tensor` ranks: a launcher's, or processes started here.

    `ranks` is None if there is only this process. Returns the exit code. Raises ValueError if the launcher has started
    another number of ranks, or if this machine has too few GPUs.
    """
    ranks = discover()
    if ranks is not None and ranks.world_size > 1:
        if ranks.world_size != tensor:
            raise ValueError(f"--tensor {tensor}: must be {ranks.world_size}, the ranks that {ranks.source} started")
        try:
            function(ranks, *args)
        except (Exception, KeyboardInterrupt):
            traceback.print_exc()
            leave(1)
        return 0
    if tensor == 1:
        with ended_by_sigterm():
            function(None, *args)
        return 0
    if 0 < torch.cuda.device_count() < tensor:
        raise ValueError(f"--tensor {tensor}: must be at most {torch.cuda.device_count()}, the number of GPUs here")
    return run_local(function, tensor, args, preload=PRELOAD)

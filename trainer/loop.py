"""The training loop as every rank runs it: data -> step -> log -> evaluation."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from griffin.kernels import local_attention, rglru
from griffin.parallel.cost import train_flops_per_token
from griffin.parallel.grid import Grid, rank_grid
from griffin.parallel.norm import apex_rms_norm
from griffin.parallel.ranks import Ranks
from griffin.parallel.stage import stage_blocks
from griffin.trainer.config import Config
from griffin.trainer.console import Console
from griffin.trainer.data.dataset import Samples, build_index, open_samples
from griffin.trainer.data.loader import batches
from griffin.trainer.metrics import MetricsWriter
from griffin.trainer.optimizer import optimizer_name
from griffin.trainer.run_folder import RunFolder, describe_environment
from griffin.trainer.step import Batch, StepResult, Training


def train(config: Config, ranks: Ranks, run_dir: Path) -> None:
    """Train a validated config on all ranks; rank 0 writes `run_dir`.

    Raises NonFiniteError (see `trainer.step`) where the loss or a gradient is NaN or infinite.
    """
    with rank_grid(config.parallel, ranks) as grid:

        def create_folder() -> None:
            environment = describe_environment(config, ranks, _device_name(grid), implementations(grid.device))
            RunFolder.create(run_dir, config, environment)

        grid.first_rank_does("run folder", create_folder)
        with Report(config, grid, RunFolder(run_dir)) as report:
            train_samples, eval_samples = _open_data(config, grid)
            training = Training(config, grid)
            train_batches = _batches(config, grid, train_samples, workers=config.data.workers)
            report.begin(train_samples)
            for step in range(config.train.steps + 1):
                if step > 0:
                    report.step(step, training.step(train_batches))
                if eval_samples is not None and _evaluates(config, step):
                    held_out = _batches(config, grid, eval_samples, workers=0)
                    report.evaluation(step, training.evaluate(held_out, config.train.eval_batches))
            report.end()


def implementations(device: torch.device) -> dict[str, str]:
    """What computes the parts that have more than one implementation."""
    return {
        "optimizer": optimizer_name(),
        "norm": "torch rms_norm" if apex_rms_norm() is None else "apex mixed_dtype_fused_rms_norm_affine",
        "attention": local_attention.select_backend(device),
        "scan": rglru.select_backend(device),
    }


def _evaluates(config: Config, step: int) -> bool:
    """Before the first step, every `train.eval_interval` steps, and at the end; never if the interval is 0."""
    interval = config.train.eval_interval
    return interval > 0 and (step % interval == 0 or step == config.train.steps)


def _open_data(config: Config, grid: Grid) -> tuple[Samples, Samples | None]:
    blends = {"train": (config.data.train, config.train.steps), "eval": (config.data.eval, config.train.eval_batches)}
    settings: dict[str, Any] = {
        "sequence_length": config.data.sequence_length,
        "seed": config.train.seed,
        "cache": config.data.cache or None,
    }

    def build() -> None:
        for entries, global_batches in blends.values():
            if entries:
                build_index(entries, samples=global_batches * config.train.global_batch, **settings)

    grid.first_rank_does("data index", build)
    train_samples, eval_samples = (
        open_samples(entries, **settings) if entries else None for entries, _ in blends.values()
    )
    assert train_samples is not None, "validated: data.train is not empty"
    return train_samples, eval_samples


def _batches(config: Config, grid: Grid, samples: Samples, *, workers: int) -> Iterator[Batch]:
    return batches(
        samples,
        first_step=0,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        data_rank=grid.data_rank,
        data_size=grid.data_size,
        workers=workers,
    )


def _device_name(grid: Grid) -> str:
    return torch.cuda.get_device_name(grid.device) if grid.device.type == "cuda" else "cpu"


def _tensorboard() -> str:
    """The command as this person can type it: the environment need not be activated."""
    return "tensorboard" if shutil.which("tensorboard") else os.path.relpath(Path(sys.prefix, "bin", "tensorboard"))


class Report:
    """Rank 0's console and metrics of a run; on other ranks it does nothing. A context manager."""

    def __init__(self, config: Config, grid: Grid, folder: RunFolder):
        self._config, self._grid, self._folder = config, grid, folder
        self._flops = train_flops_per_token(config.model, config.data.sequence_length)
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._restart_clock()
        self._stack = ExitStack()

    def __enter__(self) -> Report:
        if not self._grid.is_first_rank:
            return self
        config, grid = self._config, self._grid
        self._console = self._stack.enter_context(Console(self._folder, config.train.steps))
        self._metrics = self._stack.enter_context(MetricsWriter(self._folder, config.log.tensorboard))
        sizes = stage_blocks(config.model, config.parallel, config.data.sequence_length)
        self._console.print(
            f"Run folder: {self._folder.path}\n"
            f"{grid.world_size} rank{'s' * (grid.world_size > 1)}: tensor {grid.tensor_size} x pipeline "
            f"{grid.pipeline_size} x data {grid.data_size}; blocks per stage {', '.join(map(str, sizes))}"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def begin(self, samples: Samples) -> None:
        """Call right before the first step: its time starts here."""
        if not self._grid.is_first_rank:
            return
        drawn = self._config.train.steps * self._config.train.global_batch
        self._console.print(
            f"Data: {samples.tokens:,} tokens, {samples.samples_per_epoch:,} sequences; "
            f"the run draws {drawn:,} ({drawn / samples.samples_per_epoch:.2f} epochs)"
        )
        self._restart_clock()

    def step(self, step: int, result: StepResult) -> None:
        if not self._grid.is_first_rank:
            return
        self._steps_since += 1
        config = self._config
        if step != 1 and step % config.log.interval and step != config.train.steps:
            self._console.step(step)
            return
        seconds = (time.perf_counter() - self._since) / self._steps_since
        tokens = config.train.global_batch * config.data.sequence_length
        values = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens": step * tokens,
            "loss_tokens": result.loss_tokens,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "model_tflops_per_device": self._flops * tokens / seconds / self._grid.world_size / 1e12,
        }
        self._metrics.log(step, values)
        self._console.step(step, values)
        self._note("training", result.loss)
        self._restart_clock()

    def evaluation(self, step: int, loss: float) -> None:
        if not self._grid.is_first_rank:
            return
        self._metrics.log(step, {"eval_loss": loss})
        self._console.print(f"step {step}: eval_loss {loss:.4f}")
        self._note("held-out", loss)
        self._restart_clock()  # the evaluation's time is no step's

    def end(self) -> None:
        """The last lines that a person sees."""
        if not self._grid.is_first_rank:
            return
        for name, last in self._last.items():
            self._console.print(f"{name} loss: {self._first[name]:.3f} -> {last:.3f} nats per token")
        self._console.print(f"Run folder: {self._folder.path}")
        if self._config.log.tensorboard:
            self._console.print(f"Curves: {_tensorboard()} --logdir {self._folder.path}")

    def _note(self, name: str, loss: float) -> None:
        self._first.setdefault(name, loss)
        self._last[name] = loss

    def _restart_clock(self) -> None:
        self._since, self._steps_since = time.perf_counter(), 0

"""The report of a run: rank 0's console and metrics."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from griffin.parallel.config import RECURRENT
from griffin.parallel.cost import train_flops_per_token
from griffin.parallel.world.grid import Grid
from griffin.trainer.checkpoint.checkpoints import Position
from griffin.trainer.checkpoint.saving.saver import Outcome
from griffin.trainer.checkpoint.source import Source
from griffin.trainer.data.dataset import Samples
from griffin.trainer.health.spikes import SpikeDetector
from griffin.trainer.measuring.clock import StepTimes
from griffin.trainer.measuring.peak import peak
from griffin.trainer.measuring.rglru_health import layer_name
from griffin.trainer.optimizer import schedule_end
from griffin.trainer.reporting.console import Console, figure_text
from griffin.trainer.reporting.goodput import Goodput
from griffin.trainer.reporting.metrics import MetricsWriter, is_predicted
from griffin.trainer.run.folder import RunFolder, changed_settings
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import StepResult
from griffin.trainer.summary import summarize


def _tensorboard() -> str:
    """The tensorboard command as the user can type it: the environment need not be activated."""
    return "tensorboard" if shutil.which("tensorboard") else os.path.relpath(Path(sys.prefix, "bin", "tensorboard"))


class Report:
    """Console and metrics of a run, on rank 0. On other ranks, it does nothing. A context manager.

    `source` is what this attempt starts from.
    """

    def __init__(self, config: Config, grid: Grid, folder: RunFolder, source: Source):
        self._config, self._grid, self._folder, self._source = config, grid, folder, source
        self._flops = train_flops_per_token(config.model, config.data.sequence_length)
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Report:
        if not self._grid.is_first_rank:
            return self
        config, grid, folder, source = self._config, self._grid, self._folder, self._source
        self._console = self._stack.enter_context(Console(folder, config.train.steps, source.step))
        self._metrics = self._stack.enter_context(
            MetricsWriter(
                folder,
                config.log.tensorboard,
                folder.attempt,
                source.step,
                say=self._console.print,
                named_sets=isinstance(config.data.eval, dict),
            )
        )
        self._goodput = Goodput(folder, source.step)
        self._console.print(
            f"Run folder: {folder.path}{f', attempt {folder.attempt}' * (folder.attempt > 1)}\n"
            f"{summarize(config, grid.world_size, grid)}"
        )
        for text in source.skipped:
            self._console.print(f"DAMAGED CHECKPOINT, skipped: {text}")
        self._console.print(source.text)
        if source.everything and source.config is not None and (changed := changed_settings(config, source.config)):
            self._console.print(f"Changed since then: {', '.join(changed)}")
        if (end := schedule_end(config)) < config.train.steps:
            least = config.optimizer.min_learning_rate
            self._console.print(
                f"Learning rate: its decay ends at step {end}; later steps keep optimizer.min_learning_rate = "
                f"{least:g}. Set optimizer.decay_steps for another decay"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        if self._grid.is_first_rank:
            self._console.print(text)

    def begin(self, samples: Samples, total_samples: int) -> None:
        """Call right before the first step: the time of steps starts here.

        `total_samples` is the number of samples that the run will have read at its end.
        """
        if not self._grid.is_first_rank:
            return
        self._console.print(
            f"Data: {samples.tokens:,} tokens, {samples.samples_per_epoch:,} sequences; "
            f"the run reads {total_samples:,} ({total_samples / samples.samples_per_epoch:.2f} epochs)"
        )
        config = self._config
        self._peak = peak(self._grid.device, getattr(torch, config.train.dtype), config.log.peak_tflops)
        self._console.print(f"MFU: relative to {self._peak.tflops:,.3g} TFLOP/s per device ({self._peak.source})")
        self._restart_clock()

    def checkpoint(self, position: Position, seconds: float) -> None:
        """A save has begun, for which the training waited `seconds`."""
        if self._grid.is_first_rank:
            self._goodput.saved(position.step)
            self._metrics.log(
                position.step, {"checkpoint_stall_seconds": seconds, "trained_seconds": self._goodput.trained_seconds}
            )
            self._restart_clock()  # the stall is no step's time

    def saved(self, outcome: Outcome) -> None:
        """A save has ended, successfully or not."""
        if not self._grid.is_first_rank:
            return
        if outcome.error is not None:
            self._console.print(f"CHECKPOINT FAILED: step {outcome.step}: {outcome.error}")
            return
        if outcome.warning is not None:
            self._console.print(f"CHECKPOINT of step {outcome.step} is complete, but: {outcome.warning}")
        self._metrics.log(outcome.step, {"checkpoint_seconds": outcome.seconds, "checkpoint_bytes": outcome.bytes})
        size = f"{outcome.bytes / 2**30:.2f} GiB" if outcome.bytes >= 2**30 else f"{outcome.bytes / 2**20:.1f} MiB"
        self._console.print(f"step {outcome.step}: saved {size} in {outcome.seconds:.1f} s: {outcome.path}")

    def is_logged(self, step: int) -> bool:
        """Whether the figures of a step are logged, for which it is measured. The same on every rank."""
        return self._is_due(step, self._config.log.interval)

    def is_health_logged(self, step: int) -> bool:
        """Whether the RG-LRU's gates are observed in a step. The same on every rank."""
        interval = self._config.log.health_interval
        return interval > 0 and RECURRENT in self._config.model.pattern and self._is_due(step, interval)

    def _is_due(self, step: int, interval: int) -> bool:
        """Every `interval` steps, and at this attempt's first and the run's last step."""
        return step in (self._source.step + 1, self._config.train.steps) or step % interval == 0

    def step(self, position: Position, result: StepResult, spikes: SpikeDetector | None) -> None:
        """A step is done; `spikes` has the counts of skipped updates and rewinds."""
        if not self._grid.is_first_rank:
            return
        step = position.step
        self._goodput.step(counts=result.spike is None)
        self._times.append(result.times)
        if result.health is not None:
            self._metrics.log(step, result.health.values())
            layers = result.health.layers.items()
            self._metrics.histograms(
                step, {f"rglru/log2_memory/{layer_name(index)}": layer.histogram() for index, layer in layers}
            )
        if not result.measured:
            self._console.step(step)
            if result.stop:  # this step is saved now, and the next attempt continues its count
                self._metrics.log(step, self._goodput.values())
            return
        figures = self._figures(position, result) | _counts(spikes)
        self._metrics.log(step, figures)
        self._console.step(step, figures)
        if is_predicted("loss", figures):
            self._note_loss("training", result.loss)
        self._restart_clock()

    def _figures(self, position: Position, result: StepResult) -> dict[str, float]:
        """The figures of a logged step. Times are means over the steps since the clock was restarted."""
        config, steps = self._config, len(self._times)
        seconds = (time.perf_counter() - self._since) / steps
        tokens = config.train.global_batch * config.data.sequence_length
        tflops = self._flops * tokens / seconds / self._grid.world_size / 1e12
        busy = sum(times.data_wait + times.forward_backward for times in self._times) / steps
        optimizer = sum(times.optimizer for times in self._times) / steps
        measured = dict(result.measured)
        # While a rank waits for data, the others wait for that rank: this counts as data wait of this rank too.
        wait = min(measured.pop("data_wait_seconds"), busy)
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens": position.samples * config.data.sequence_length,
            "loss_tokens": result.loss_tokens,
            "step_seconds": seconds,
            "forward_backward_seconds": busy - wait,
            "optimizer_seconds": optimizer,
            "data_wait_seconds": wait,
            "other_seconds": max(0.0, seconds - busy - optimizer),
            "tokens_per_second": tokens / seconds,
            "model_tflops_per_device": tflops,
            "mfu": tflops / self._peak.tflops,
            **measured,
            **self._goodput.values(),
            "restarts": self._folder.attempt - 1,
        }

    def spike(self, step: int, text: str, spikes: SpikeDetector, rewound_to: int | None) -> None:
        """`step` was a spike. The training has returned to step `rewound_to`, or skipped the update if that is None."""
        if not self._grid.is_first_rank:
            return
        self._console.print(f"step {step}: {text}")
        self._metrics.log(step, _counts(spikes))
        if rewound_to is not None:
            self._metrics.rewind(rewound_to)
            self._goodput.rewind(rewound_to)
            self._restart_clock()

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of an evaluation (see `trainer.evaluation`)."""
        if not self._grid.is_first_rank:
            return
        self._metrics.log(step, figures)
        shown = [key for key in figures if not key.startswith("eval_loss_tokens")]
        self._console.print(f"step {step}: {'  '.join(figure_text(key, figures) for key in shown)}")
        for key, value in figures.items():
            figure, _, name = key.partition("/")
            if figure == "eval_loss" and is_predicted(key, figures):
                self._note_loss(f"held-out {name}".strip(), value)
        self._restart_clock()  # the evaluation's time is no step's

    def end(self) -> None:
        """Print the last lines of the run."""
        if not self._grid.is_first_rank:
            return
        for name, last in self._last.items():
            self._console.print(f"{name} loss: {self._first[name]:.3f} -> {last:.3f} nats per token")
        self._console.print(f"Run folder: {self._folder.path}")
        if self._config.log.tensorboard:
            self._console.print(f"Curves: {_tensorboard()} --logdir {self._folder.events.parent}")

    def _note_loss(self, name: str, loss: float) -> None:
        self._first.setdefault(name, loss)
        self._last[name] = loss

    def _restart_clock(self) -> None:
        """Start measuring the time of the next step."""
        self._since = time.perf_counter()
        self._times: list[StepTimes] = []
        self._goodput.resume()


def _counts(spikes: SpikeDetector | None) -> dict[str, float]:
    return {
        "skipped_updates": spikes.skipped if spikes is not None else 0,
        "rewinds": spikes.rewinds if spikes is not None else 0,
    }

"""Spikes of the loss or of the gradient norm: told from the steps before, answered as configured, written down."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from griffin.parallel.world.grid import Grid
from griffin.parallel.world.ranks import RunError
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.log_file import LogFile
from griffin.trainer.settings.sections import TrainConfig

SKIP, REWIND = "skip", "rewind"
LOSS, GRAD_NORM, NOT_FINITE = "loss", "gradient norm", "not finite"
# Of normally distributed values, the standard deviation over the median distance from the median.
NORMAL = 1.4826
# Where values hardly differ, as in a synthetic data set, a spike still has to be one: the least standard deviation, of
# the loss as a share of its median and of the gradient norm's logarithm.
LEAST_LOSS, LEAST_LOG_GRAD_NORM = 0.005, 0.02


class SpikeError(RunError):
    """More spikes than `train.spike_limit` allows. Raised on every rank, before the optimizer changes a weight."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step whose update was not made."""

    kind: str  # LOSS, GRAD_NORM or NOT_FINITE
    loss: float
    grad_norm: float
    text: str  # what is unusual about it, in one line


class SpikeDetector:
    """Tells spikes by the last `train.spike_window` steps that were none; the same on every rank, which see the same.

    A value is one where it lies `train.spike_deviations` robust standard deviations (1.4826 times the median distance
    from the median) above the median: the loss itself, or the logarithm of the gradient norm. Half a window of steps
    comes before the first judgement. What is not finite always is one.
    """

    def __init__(self, config: TrainConfig):
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._log_grad_norms: deque[float] = deque(maxlen=config.spike_window)
        self._spikes: list[int] = []  # their steps, as far as they still count; a rewind leads to some anew
        self.skipped, self.rewinds = 0, 0

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """Whether the step with this loss and gradient norm (before clipping) is a spike; notes it if not."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Spike(
                kind=NOT_FINITE, loss=loss, grad_norm=grad_norm, text=f"loss {loss}, gradient norm {grad_norm}"
            )
        log_grad_norm = math.log(max(grad_norm, 1e-30))
        if len(self._losses) >= math.ceil(self._config.spike_window / 2):
            median, deviation = _robust(self._losses)
            deviations = (loss - median) / max(deviation, LEAST_LOSS * abs(median), 1e-30)
            if deviations > self._config.spike_deviations:
                text = f"loss {loss:.4f} is {deviations:.1f} deviations above the median {median:.4f}"
                return Spike(kind=LOSS, loss=loss, grad_norm=grad_norm, text=text)
            median, deviation = _robust(self._log_grad_norms)
            deviations = (log_grad_norm - median) / max(deviation, LEAST_LOG_GRAD_NORM)
            if deviations > self._config.spike_deviations:
                median = math.exp(median)
                text = f"gradient norm {grad_norm:.4g} is {deviations:.1f} deviations (of logarithms) above the median "
                return Spike(kind=GRAD_NORM, loss=loss, grad_norm=grad_norm, text=f"{text}{median:.4g}")
        self._losses.append(loss)
        self._log_grad_norms.append(log_grad_norm)
        return None

    def is_too_many(self, step: int) -> bool:
        """Count a spike in `step`: whether there were `spike_limit` in the `spike_window` steps before it, or in it."""
        self._spikes = [earlier for earlier in self._spikes if earlier >= step - self._config.spike_window]
        self._spikes.append(step)
        return len(self._spikes) > self._config.spike_limit

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "losses": list(self._losses),
            "log_grad_norms": list(self._log_grad_norms),
            "spikes": self._spikes,
            "skipped": self.skipped,
            "rewinds": self.rewinds,
        }

    def restore(self, state: Mapping[str, Any], *, values_only: bool = False) -> None:
        """Go on from a `state`; with `values_only`, in a rewind, what was counted since then stays counted."""
        self._losses = deque(state["losses"], self._config.spike_window)
        self._log_grad_norms = deque(state["log_grad_norms"], self._config.spike_window)
        if not values_only:
            self._spikes, self.skipped, self.rewinds = list(state["spikes"]), state["skipped"], state["rewinds"]


class Ledger:
    """ledger.jsonl of a run folder, in which rank 0 writes one line for each spike. A context manager."""

    def __init__(self, grid: Grid, folder: RunFolder, say: Callable[[str], object]) -> None:
        self._file = LogFile(folder.ledger, say) if grid.is_first_rank else None
        self._attempt = folder.attempt

    def write(self, spike: Spike, **fields: Any) -> None:
        """A line with what `spike` was and `fields`: step, action, first and last sample, where it went on."""
        if self._file is None:
            return
        line = {
            "time": round(time.time(), 3),
            "attempt": self._attempt,
            "kind": spike.kind,
            "text": spike.text,
            "loss": spike.loss if math.isfinite(spike.loss) else None,
            "grad_norm": spike.grad_norm if math.isfinite(spike.grad_norm) else None,
        }
        self._file.write(json.dumps(line | fields, allow_nan=False) + "\n")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _robust(values: deque[float]) -> tuple[float, float]:
    """Median and robust standard deviation."""
    median = statistics.median(values)
    return median, NORMAL * statistics.median(abs(value - median) for value in values)

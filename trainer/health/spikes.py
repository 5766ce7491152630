"""Spikes of the loss or the gradient norm: their detection, and the ledger that records them."""

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
# The least standard deviations: of the loss, as a share of its median, and of the logarithm of the gradient norm. Where
# values hardly vary, as with synthetic data, small changes are not spikes.
LEAST_LOSS, LEAST_LOG_GRAD_NORM = 0.005, 0.02


class SpikeError(RunError):
    """More spikes than `train.spike_limit` allows. Raised on every rank, before the optimizer changes a weight."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A spike: a step whose update is skipped."""

    kind: str  # LOSS, GRAD_NORM or NOT_FINITE
    loss: float
    grad_norm: float
    text: str  # what is unusual, in one line


class SpikeDetector:
    """Detects spikes from the last `train.spike_window` normal steps. All ranks see the same values and agree.

    A step is a spike if its loss, or the logarithm of its gradient norm, lies `train.spike_deviations` robust standard
    deviations (1.4826 times the median distance from the median) above the median of that window. Detection starts
    after half a window of steps. A value that is not finite is always a spike.
    """

    def __init__(self, config: TrainConfig):
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._log_grad_norms: deque[float] = deque(maxlen=config.spike_window)
        self._spikes: list[int] = []  # steps of recent spikes; after a rewind, a step may occur again
        self.skipped, self.rewinds = 0, 0

    def detect(self, loss: float, grad_norm: float) -> Spike | None:
        """The spike that this loss and gradient norm (before clipping) are, or None: then they join the window."""
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
        """Count the spike of `step`. Returns whether there are more than `spike_limit` within `spike_window` steps."""
        self._spikes = [earlier for earlier in self._spikes if earlier >= step - self._config.spike_window]
        self._spikes.append(step)
        return len(self._spikes) > self._config.spike_limit

    def state(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        return {
            "losses": list(self._losses),
            "log_grad_norms": list(self._log_grad_norms),
            "spikes": self._spikes,
            "skipped": self.skipped,
            "rewinds": self.rewinds,
        }

    def restore(self, state: Mapping[str, Any], *, values_only: bool = False) -> None:
        """Restore a `state`. With `values_only`, for a rewind, the counts stay as they are."""
        self._losses = deque(state["losses"], self._config.spike_window)
        self._log_grad_norms = deque(state["log_grad_norms"], self._config.spike_window)
        if not values_only:
            self._spikes, self.skipped, self.rewinds = list(state["spikes"]), state["skipped"], state["rewinds"]


class SpikeLedger:
    """ledger.jsonl of a run folder: rank 0 writes a line for each spike. A context manager."""

    def __init__(self, grid: Grid, folder: RunFolder, say: Callable[[str], object]) -> None:
        self._file = LogFile(folder.ledger, say) if grid.is_first_rank else None
        self._attempt = folder.attempt

    def write(self, spike: Spike, **fields: Any) -> None:
        """Write a line with `spike` and `fields`: step, action, samples, and the step rewound to."""
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

    def __enter__(self) -> SpikeLedger:
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

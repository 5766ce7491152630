"""Goodput: which share of a run's wall time, over all its attempts, made the steps that it now stands on."""

from __future__ import annotations

import math
import time
from datetime import datetime

from griffin.trainer.files import SETTINGS_BYTES, is_integer, parse_json, read_regular
from griffin.trainer.run.folder import TIME_FORMAT, RunFolder
from griffin.trainer.run.json_lines import lines_from_end


class Goodput:
    """Counts seconds of steps. What came to nothing does not count: steps after the checkpoint that an attempt goes on
    from, starts, evaluations, checkpoints' stalls, and the time between attempts.

    The count at each saved step is in metrics.jsonl, from where the next attempt goes on; `start` is the step that
    this one begins after.
    """

    def __init__(self, folder: RunFolder, start: int):
        self._folder = folder
        self._begun = _first_start(folder)
        self._at = {start: _trained_until(folder, start)}  # seconds at the start and at each save of this attempt
        self.trained_seconds = self._at[start]
        self.resume()

    def resume(self) -> None:
        """The time since the last step was no step's."""
        self._since = time.perf_counter()

    def step(self, *, counts: bool = True) -> None:
        """A step has ended that began at the end of the last one, or at `resume`; a skipped update does not count."""
        now = time.perf_counter()
        if counts:
            self.trained_seconds += now - self._since
        self._since = now

    def saved(self, step: int) -> None:
        """The state after `step` is one that the run can go back to."""
        self._at[step] = self.trained_seconds

    def rewind(self, step: int) -> None:
        """The run goes back to a saved step: what it did after that does not count."""
        if step not in self._at:  # an earlier attempt's
            self._at[step] = _trained_until(self._folder, step)
        self.trained_seconds = self._at[step]
        self._at = {saved: seconds for saved, seconds in self._at.items() if saved <= step}
        self.resume()

    def values(self) -> dict[str, float]:
        elapsed = time.time() - self._begun
        # Clocks of two machines, or one that was put right, may differ.
        share = min(1.0, self.trained_seconds / elapsed) if elapsed > 0 else 1.0
        return {"trained_seconds": self.trained_seconds, "goodput": share}


def _first_start(folder: RunFolder) -> float:
    """Unix time at which the run's first attempt began; now, where its file does not say."""
    try:
        started = parse_json(read_regular(RunFolder(folder.path).environment, SETTINGS_BYTES))["started"]
        return datetime.strptime(started, TIME_FORMAT).timestamp()
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return time.time()


def _trained_until(folder: RunFolder, step: int) -> float:
    """Seconds of the steps up to `step`, of the last attempt that came there; 0 where that is not known.

    Where the line of that step was lost, up to the last step before it that has one.
    """
    if step == 0:
        return 0.0
    try:
        for line in lines_from_end(folder.metrics):
            seconds = line.get("trained_seconds")
            if is_integer(line.get("step"), 0, step) and isinstance(seconds, float) and 0 <= seconds < math.inf:
                return seconds
    except OSError:
        pass
    return 0.0

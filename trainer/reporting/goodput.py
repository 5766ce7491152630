"""Goodput: the share of a run's wall time, over all attempts, spent on steps that still count."""

from __future__ import annotations

import math
import time
from datetime import datetime

from griffin.trainer.files import SETTINGS_BYTES, is_integer, parse_json, read_regular
from griffin.trainer.run.folder import TIME_FORMAT, RunFolder
from griffin.trainer.run.json_lines import lines_from_end


class Goodput:
    """Counts the seconds of steps that still count.

    Steps that were lost after the last checkpoint do not count, nor do startup, evaluations, stalls of checkpoints, and
    the time between attempts. The count at each saved step is in metrics.jsonl, where the next attempt reads it.
    `start` is the step after which this attempt begins.
    """

    def __init__(self, folder: RunFolder, start: int):
        self._folder = folder
        self._run_start = _first_start(folder)
        self._saved = {start: _trained_until(folder, start)}  # seconds at the start and at each save of this attempt
        self.trained_seconds = self._saved[start]
        self.resume()

    def resume(self) -> None:
        """Restart the clock: the time since the last step was not spent on a step."""
        self._since = time.perf_counter()

    def step(self, *, counts: bool = True) -> None:
        """Count the time since the last step or `resume` as that of a step; `counts` is False for a skipped update."""
        now = time.perf_counter()
        if counts:
            self.trained_seconds += now - self._since
        self._since = now

    def saved(self, step: int) -> None:
        """Note that the run can go back to the state after `step`."""
        self._saved[step] = self.trained_seconds

    def rewind(self, step: int) -> None:
        """Go back to the count at a saved step: later steps do not count."""
        if step not in self._saved:  # saved by an earlier attempt
            self._saved[step] = _trained_until(self._folder, step)
        self.trained_seconds = self._saved[step]
        self._saved = {saved: seconds for saved, seconds in self._saved.items() if saved <= step}
        self.resume()

    def values(self) -> dict[str, float]:
        elapsed = time.time() - self._run_start
        # The clocks of two machines may differ, or a clock may have been set.
        share = min(1.0, self.trained_seconds / elapsed) if elapsed > 0 else 1.0
        return {"trained_seconds": self.trained_seconds, "goodput": share}


def _first_start(folder: RunFolder) -> float:
    """Unix time of the start of the run's first attempt; the current time if its file does not say."""
    try:
        started = parse_json(read_regular(RunFolder(folder.path).environment, SETTINGS_BYTES))["started"]
        return datetime.strptime(started, TIME_FORMAT).timestamp()
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return time.time()


def _trained_until(folder: RunFolder, step: int) -> float:
    """Seconds of the steps up to `step` in the last attempt that reached it; 0 if unknown.

    If the line of that step was lost, up to the last step before it that has one.
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

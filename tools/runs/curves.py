"""A run's figures as curves, read from its metrics.jsonl."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from griffin.tools.runs.state import is_figure, open_run_folder
from griffin.trainer.files import is_integer
from griffin.trainer.reporting.metrics import is_predicted
from griffin.trainer.run.attempts import MOST_STEPS
from griffin.trainer.run.json_lines import lines_from_end

# What a curve goes over, and the figure that counts it.
AXES = {"tokens": "tokens", "steps": None, "seconds": "trained_seconds"}


@dataclass(frozen=True)
class Curves:
    """The curves of a run."""

    path: Path
    figures: dict[str, np.ndarray]  # float64 [2, points]: steps, ascending, and values
    others: Collection[str]  # figures that the run has besides

    def over(self, figure: str, axis: str) -> np.ndarray:
        """A figure over one of `AXES`, float64 [2, points]: x and y. ValueError where the run has not counted it."""
        steps, values = self.figures[figure]
        if (counter := AXES[axis]) is None:
            return self.figures[figure]
        if counter not in self.figures:
            raise ValueError(f"--over {axis}: {self.path} has no figure {counter}")
        # Step 0 is at 0. An evaluation may be of a step that was not logged.
        known = np.concatenate([np.zeros((2, 1)), self.figures[counter]], axis=1)
        return np.stack([np.interp(steps, *known), values])


def read_curves(path: Path, figures: Collection[str]) -> Curves:
    """Read those of `figures` that a run has.

    Steps that a rewind or a later attempt did again count once, as they were done last. ValueError where `path` is no
    run folder.
    """
    wanted = {*figures, *AXES.values()}
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)  # the last first
    others: set[str] = set()
    earliest = MOST_STEPS
    for line in lines_from_end(open_run_folder(path).metrics):
        step: Any = line.get("step")
        if not is_integer(step, 0, earliest):
            continue
        if "loss" in line:
            earliest = step
        for figure, value in line.items():
            if not is_figure(value) or not is_predicted(figure, line):
                continue
            if figure not in wanted:
                others.add(figure)
            elif not points[figure] or step < points[figure][-1][0]:
                points[figure].append((step, value))
    curves = {figure: np.array(found[::-1], dtype=np.float64).T for figure, found in points.items()}
    return Curves(path, curves, others - {"step", "attempt", "time"})


def thin(points: np.ndarray, most: int) -> np.ndarray:
    """At most so many points, each the mean of about as many neighbours. [2, points] -> [2, at most `most`]"""
    if points.shape[1] <= most:
        return points
    return np.stack([part.mean(axis=1) for part in np.array_split(points, most, axis=1)], axis=1)

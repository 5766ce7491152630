"""Read the state of a run from its folder, on any machine that sees it. Nothing is written."""

from __future__ import annotations

import math
import os
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin.trainer.files import SETTINGS_BYTES, is_integer, open_regular, parse_json, parse_toml, read_regular
from griffin.trainer.reporting.metrics import is_predicted
from griffin.trainer.run.attempts import FAILED, FINISHED, HUNG, MOST_STEPS, STOPPED, End, read_end
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.json_lines import Follower
from griffin.trainer.run.lock import PATIENCE_SECONDS, Owner

HISTORY = 400  # number of logged losses kept
SILENT_SECONDS = 60.0  # a run without news for this long is silent, unless its steps take longer
EVENTS = 5  # number of newest events kept
HEAD_BYTES = 2**16  # read of a report, whose first lines are shown

RUNNING, SILENT, GONE = "running", "silent", "gone"
EMPTY = "not started"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run's state at one moment. `figures` are the newest values by their names in metrics.jsonl."""

    path: Path
    status: str
    detail: str  # a few words on the status
    attempt: int
    step: int
    steps: int
    figures: Mapping[str, float]  # None if not finite
    losses: Sequence[tuple[int, float]]  # (step, loss) of logged steps, the newest last
    evaluation: int | None  # step of the newest evaluation
    checkpoint: tuple[int, float] | None  # newest complete one: step, and seconds since it was written
    events: Sequence[Mapping[str, Any]]  # newest lines of the ledger
    hangs: Sequence[str]  # names of all hang reports, the newest last
    hang: Sequence[str]  # first lines of the newest one
    stragglers: Mapping[str, Any]
    last_line: str  # of the console

    @property
    def seconds_left(self) -> float | None:
        seconds = self.figures.get("step_seconds")
        return None if seconds is None else seconds * max(0, self.steps - self.step)


def open_run_folder(path: Path) -> RunFolder:
    """Return what names the files of a run; ValueError where `path` is no run folder."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder")
    folder = RunFolder(path)
    if not (folder.config.exists() or folder.lock.exists()):
        raise ValueError(f"{path}: not a run folder; it has no {folder.config.name}")
    return folder


class RunReader:
    """Reads a run folder repeatedly; of growing files only what is new."""

    def __init__(self, path: Path):
        """Raises ValueError if `path` is not a run folder."""
        folder = open_run_folder(path)
        self._folder = folder
        self._metrics = Follower(folder.metrics)
        self._ledger = Follower(folder.ledger, 2**16)
        self._figures: dict[str, float] = {}
        self._losses: deque[tuple[int, float]] = deque(maxlen=HISTORY)
        self._events: deque[Mapping[str, Any]] = deque(maxlen=EVENTS)
        self._evaluation: int | None = None
        self._step, self._time = 0, 0.0

    def read(self) -> RunState:
        """Read what is new and return the current state."""
        for line in self._metrics.read():
            self._add_metrics(line)
        self._events.extend(self._ledger.read())
        folder = RunFolder(self._folder.path, _attempt(self._folder.path))
        config = _config(folder.config)
        stated: Any = config.get("train", {}).get("steps")
        steps: int = stated if is_integer(stated, 0, MOST_STEPS) else 0
        checkpoint = _newest_checkpoint(folder.checkpoints)
        step = max(self._step, checkpoint[0] if checkpoint else 0) if not self._figures else self._step
        console = _last_lines(folder.console)
        hangs = _names(folder.hangs)
        status, detail = self._status(folder, config, step, steps, console)
        return RunState(
            path=folder.path,
            status=status,
            detail=detail,
            attempt=folder.attempt,
            step=step,
            steps=steps,
            figures=dict(self._figures),
            losses=list(self._losses),
            evaluation=self._evaluation,
            checkpoint=checkpoint,
            events=list(self._events),
            hangs=hangs,
            hang=_head(folder.hangs / hangs[-1] / "report.txt") if hangs else [],
            stragglers=_json(folder.stragglers),
            last_line=console[-1] if console else "",
        )

    def _add_metrics(self, line: dict[str, Any]) -> None:
        step = line.pop("step", None)
        if not is_integer(step, 0, MOST_STEPS):
            return
        line = {key: value for key, value in line.items() if value is None or is_figure(value)}
        if "loss" in line:
            while self._losses and self._losses[-1][0] >= step:  # the run went back to an earlier step
                self._losses.pop()
            if line["loss"] is not None and is_predicted("loss", line):
                self._losses.append((step, line["loss"]))
            self._step = step
        if any(key.partition("/")[0] == "eval_loss" for key in line):
            self._evaluation = step
        self._time = line.pop("time", None) or self._time
        line.pop("attempt", None)
        self._figures.update(line)

    def _status(
        self, folder: RunFolder, config: Mapping[str, Any], step: int, steps: int, console: Sequence[str]
    ) -> tuple[str, str]:
        """Return the status and its detail."""
        if not folder.path.is_dir():
            return EMPTY, "its folder is gone"
        hung = any(name.endswith(f"-attempt-{folder.attempt}") for name in _names(folder.hangs))  # ends an attempt
        end = read_end(folder)
        hung = hung or (end is not None and end.why == HUNG)
        try:
            text, touched = read_regular(folder.lock, SETTINGS_BYTES), folder.lock.stat().st_mtime
        except OSError:
            if end is not None:
                return _ended(end)
            return (HUNG, "") if hung else _guess_status(folder, step, steps, console)
        now = time.time()
        owner = Owner.parse(text)
        who = "an unnamed owner" if owner is None else f"{owner.user} on {owner.host}"
        if owner is not None and owner.job:
            who += f", job {owner.job.strip('/')}"
        age = max(0.0, now - touched)  # another machine's clock may be ahead
        ended = None if owner is None else owner.has_ended(Owner.current())
        if ended or (ended is None and age > PATIENCE_SECONDS):
            return HUNG if hung else GONE, f"{who}; last sign of life {duration(age)} ago, its lock was left behind"
        last_news = max(self._time, _changed(folder.console), _changed(folder.config))
        quiet = max(0.0, now - last_news)
        expected = self._figures.get("step_seconds") or 0.0
        interval = config.get("log", {}).get("interval")
        expected *= interval if is_integer(interval, 1, MOST_STEPS) else 1
        detail = f"{who}; last figures {duration(quiet)} ago"
        if hung:
            return HUNG, detail
        return (SILENT if quiet > max(SILENT_SECONDS, 3 * expected) else RUNNING), detail


def is_figure(value: Any) -> bool:
    return is_integer(value, -(2**63), 2**63) or (isinstance(value, float) and math.isfinite(value))


def duration(seconds: float) -> str:
    """Format a duration in its two largest units, such as "3 d 4 h"."""
    parts: list[str] = []
    left = int(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _ended(end: End) -> tuple[str, str]:
    detail = f"{duration(max(0.0, time.time() - end.time))} ago"
    if end.why != FINISHED:
        detail += f", exit code {end.exit_code}"
    return end.why, detail + (f": {end.error.splitlines()[0]}" if end.error.strip() else "")


def _guess_status(folder: RunFolder, step: int, steps: int, console: Sequence[str]) -> tuple[str, str]:
    """Guess from its console the status of an attempt without a lock whose end was not recorded."""
    if not console:
        return EMPTY, ""
    starts = [place for place, line in enumerate(console) if line.startswith("Run folder: ")]  # of attempts
    if any(line.startswith("Traceback ") for line in console[starts[-1] if starts else 0 :]):
        return FAILED, ""
    if steps and step >= steps:
        return FINISHED, f"{duration(max(0.0, time.time() - _changed(folder.console)))} ago"
    return STOPPED, f"{duration(max(0.0, time.time() - _changed(folder.console)))} ago"


def _attempt(path: Path) -> int:
    try:
        names = [re.fullmatch(r"config\.attempt-(\d+)\.toml", name) for name in os.listdir(path)]
    except OSError:
        return 1
    return max((int(match[1]) for match in names if match), default=1)


def _config(path: Path) -> dict[str, dict[str, Any]]:
    """Read the sections of a config."""
    try:
        values = parse_toml(read_regular(path, SETTINGS_BYTES).decode())
        return {name: section for name, section in values.items() if isinstance(section, dict)}
    except (OSError, ValueError):  # such as one that is being written
        return {}


def _newest_checkpoint(root: Path) -> tuple[int, float] | None:
    try:
        names = [match for name in os.listdir(root) if (match := re.fullmatch(r"step-(\d+)", name))]
        newest = max(names, key=lambda match: int(match[1]), default=None)
        return None if newest is None else (int(newest[1]), max(0.0, time.time() - (root / newest[0]).stat().st_mtime))
    except OSError:
        return None


def _last_lines(path: Path, size: int = 2**16) -> list[str]:
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return [line for line in file.read(size).decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder), key=lambda name: _changed(folder / name))
    except OSError:
        return []


def _head(report: Path) -> list[str]:
    """Return a report's first lines, up to an empty one."""
    try:
        with open_regular(report) as file:
            lines = file.read(HEAD_BYTES).decode(errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return []
    return lines[:EVENTS] + ["..."] * (len(lines) > EVENTS)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_regular(path))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

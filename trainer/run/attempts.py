"""attempts.jsonl of a run folder: when each attempt of the run started, and when and why it ended.

An attempt has two lines, {"attempt", "started"} and {"attempt", "ended", "why", "exit_code", "step"}. Times are Unix
seconds. If "why" is "failed", the second line also has "error". An attempt that was killed has the first line only.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from griffin.parallel.world.ranks import HUNG as HUNG_CODE
from griffin.parallel.world.ranks import STOPPED as STOPPED_CODE
from griffin.trainer.files import is_integer
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.json_lines import lines_from_end
from griffin.trainer.run.log_file import LogFile
from griffin.trainer.run.signals import is_interrupt

FINISHED, STOPPED, FAILED, HUNG = "finished", "stopped", "failed", "hung"
ERROR_CHARACTERS = 500  # most characters of an error's text
MOST_STEPS = 2**53


class Attempt:
    """Writes the lines of this attempt. A context manager, entered on rank 0 only; other ranks may call `hung`.

    The caller keeps `step` at the last step done, and sets `is_stopped` if the run ends on request.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], object]) -> None:
        self._folder, self._say = folder, say
        self.step = 0
        self.is_stopped = False

    def __enter__(self) -> Attempt:
        self._write(self._say, started=_now())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_interrupt(error):
            self._end(self._say, STOPPED, 128 + signal.SIGINT)
        elif error is not None:
            text = f"{type(error).__name__}: {error}"
            self._end(self._say, FAILED, 1, error=text[:ERROR_CHARACTERS])
        elif self.is_stopped:
            self._end(self._say, STOPPED, STOPPED_CODE)
        else:
            self._end(self._say, FINISHED, 0)

    def hung(self) -> None:
        """Record that the process is about to exit with HUNG. For any thread of any rank; it prints nothing."""
        self._end(lambda _: None, HUNG, HUNG_CODE)

    def _end(self, say: Callable[[str], object], why: str, exit_code: int, **fields: Any) -> None:
        self._write(say, ended=_now(), why=why, exit_code=exit_code, step=self.step, **fields)

    def _write(self, say: Callable[[str], object], **fields: Any) -> None:
        file = LogFile(self._folder.attempts, say)
        file.write(json.dumps({"attempt": self._folder.attempt} | fields) + "\n")
        file.close()


@dataclass(frozen=True, kw_only=True)
class End:
    """How an attempt ended."""

    time: float  # Unix seconds
    why: str  # FINISHED, STOPPED, FAILED or HUNG
    exit_code: int
    step: int  # the last step done
    error: str  # "" unless FAILED


def read_end(folder: RunFolder) -> End | None:
    """How the attempt of `folder` ended. None if it is running or was killed, and for a run of an older version."""
    try:
        for line in lines_from_end(folder.attempts):
            end = _parse(line) if line.get("attempt") == folder.attempt else None
            if end is not None:
                return end
    except OSError:
        pass
    return None


def _parse(line: dict[str, Any]) -> End | None:
    ended, why, code, step = (line.get(key) for key in ("ended", "why", "exit_code", "step"))
    fits = (
        isinstance(ended, float)
        and math.isfinite(ended)
        and why in (FINISHED, STOPPED, FAILED, HUNG)
        and is_integer(code, 0, 255)
        and is_integer(step, 0, MOST_STEPS)
    )
    return End(time=ended, why=why, exit_code=code, step=step, error=str(line.get("error", ""))) if fits else None  # type: ignore[arg-type]


def _now() -> float:
    return round(time.time(), 3)

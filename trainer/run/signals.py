"""Requests from outside to save and stop: SIGTERM, as schedulers send it, and SIGUSR1, their warning ahead of it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequests:
    """Notes the first of these signals that comes while it is entered, and lets the process go on.

    A context manager: handlers that were there before are given back. Python has handlers in the main thread only:
    entered in another one it notes nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self._requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> str | None:
        """Name of the signal, "SIGTERM" or "SIGUSR1"; None as long as there was none."""
        return self._requested

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which it cannot install again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requested is None:
            self._requested = signal.Signals(number).name


def is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C (SIGINT) led to it: perhaps it came up while the interrupt was dealt with."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None

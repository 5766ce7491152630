"""Requests to save and stop: SIGTERM, which schedulers send, and SIGUSR1, which they send ahead of it as a warning."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequests:
    """Records the first of these signals that arrives within the context. The process continues.

    A context manager, which restores the previous handlers. Python installs handlers in the main thread only: in
    another thread, nothing is recorded.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self._requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> str | None:
        """Name of the signal that arrived, "SIGTERM" or "SIGUSR1", or None."""
        return self._requested

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._record) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, and cannot be restored from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self._requested is None:
            self._requested = signal.Signals(number).name


def is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C (SIGINT) caused `error`, perhaps while the interrupt was being handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from griffin.trainer.run.signals import StopRequests


@pytest.fixture
def noted() -> Iterator[list[int]]:
    """Signals that reach the previous handlers, which are installed for the test."""
    noted: list[int] = []
    previous = {number: signal.signal(number, lambda got, _: noted.append(got)) for number in StopRequests.SIGNALS}
    yield noted
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_nothing_was_requested() -> None:
    with StopRequests() as requests:
        assert requests.requested is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_first_signal_is_recorded(noted: list[int], name: str) -> None:
    with StopRequests() as requests:
        signal.raise_signal(signal.Signals[name])
        assert requests.requested == name
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert requests.requested == name
    assert requests.requested == name
    assert noted == []


def test_previous_handlers_are_restored(noted: list[int]) -> None:
    with pytest.raises(KeyError), StopRequests():
        raise KeyError
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert noted == [signal.SIGTERM, signal.SIGUSR1]


def test_another_thread_changes_no_handlers(noted: list[int]) -> None:
    requested: list[str | None] = []

    def enter() -> None:
        with StopRequests() as requests:
            signal.raise_signal(signal.SIGUSR1)
            requested.append(requests.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert requested == [None]
    assert noted == [signal.SIGUSR1]

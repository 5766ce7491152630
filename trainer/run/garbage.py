"""Python's garbage collection at fixed steps: at odd times on every rank, each would make all others wait."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL = 50  # steps


@contextmanager
def collected_at_steps(interval: int = INTERVAL) -> Iterator[Callable[[int], None]]:
    """Within it, garbage is collected only when the function that it gives is called with a multiple of `interval`.

    What is alive at the start is not looked through again: most of it stays.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect(step: int) -> None:
        if step % interval == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()

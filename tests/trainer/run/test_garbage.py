"""Garbage is collected at fixed steps, and the collector is afterwards as it was."""

from __future__ import annotations

import gc
import weakref

from griffin.trainer.run.garbage import collected_at_steps


class Node:
    def __init__(self) -> None:
        self.itself = self  # a cycle, which only the collector frees


def test_cycles_live_until_their_step() -> None:
    assert gc.isenabled()
    with collected_at_steps(10) as collect:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        gone = weakref.ref(Node())
        collect(9)
        assert gone() is not None
        collect(10)
        assert gone() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collected_at_steps():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

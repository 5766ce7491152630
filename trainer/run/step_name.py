"""The name of a step's folder. A module of its own, for code that starts without torch."""

from __future__ import annotations


def step_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"

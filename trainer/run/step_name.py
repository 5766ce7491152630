"""The name of a step's folder. On its own, for what starts without torch."""

from __future__ import annotations


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"

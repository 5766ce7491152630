"""The learning rate's schedule of a run that goes on, perhaps for longer than it was meant to at first."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What a checkpoint was trained with, and how far."""

    config: Mapping[str, Mapping[str, Any]]  # `dataclasses.asdict` of a Config
    step: int


def keep_schedule(stated: Mapping[str, Any], told: Set[str], default: str, earlier: Earlier) -> dict[str, Any]:
    """The [optimizer] settings `stated` and, for those of the schedule that nobody asked to change, the earlier ones.

    What is left out would else be filled in anew from `train.steps`: a run that is made longer would warm up again.

    Args:
        stated: of the file and the command line.
        told: those that the command line states. A setting of the file asks for a change where it has changed.
        default: `optimizer.schedule` where it is left out.
    """
    before = earlier.config["optimizer"]
    asked = {key for key, value in stated.items() if key in told or value != before.get(key)}
    if stated.get("decay_end") == 0 and "decay_end" not in told:  # as in the config.toml of the run's first start
        asked.discard("decay_end")
    kept: dict[str, Any] = {}
    if "warmup_steps" in before:
        kept["warmup_steps"] = before["warmup_steps"]
    schedule = stated.get("schedule", default)
    if schedule == before.get("schedule") and "decay_steps" in before:
        kept["decay_steps"] = before["decay_steps"]
        if schedule == "wsd" and "decay_steps" not in asked:
            end = before.get("decay_end") or earlier.config["train"]["steps"]
            # A decay that is still to come moves to the new end, which this schedule is for; one that has begun stays.
            kept["decay_end"] = end if earlier.step > end - before["decay_steps"] else before.get("decay_end", 0)
    return {**stated, **{key: value for key, value in kept.items() if key not in asked}}

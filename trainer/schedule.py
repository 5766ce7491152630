"""The learning-rate schedule of a run that is resumed, perhaps with other `train.steps`."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PreviousRun:
    """The config that a checkpoint was trained with, and its step."""

    config: Mapping[str, Mapping[str, Any]]  # `dataclasses.asdict` of a Config
    step: int


def keep_schedule(
    stated: Mapping[str, Any], overridden: Set[str], default: str, previous: PreviousRun
) -> dict[str, Any]:
    """The [optimizer] settings `stated`, with schedule settings of the previous run where no change was asked for.

    Otherwise, settings that are left out would follow from the new `train.steps`, and a run that is made longer would
    warm up again.

    Args:
        stated: settings of the file and the command line.
        overridden: settings that the command line states. A setting in the file asks for a change only if it differs
            from the previous run's.
        default: `optimizer.schedule` where it is left out.
        previous: what the checkpoint to resume from was trained with.
    """
    before = previous.config["optimizer"]
    changed = {key for key, value in stated.items() if key in overridden or value != before.get(key)}
    if stated.get("decay_end") == 0 and "decay_end" not in overridden:  # as in the config.toml of the run's first start
        changed.discard("decay_end")
    kept: dict[str, Any] = {}
    if "warmup_steps" in before:
        kept["warmup_steps"] = before["warmup_steps"]
    schedule = stated.get("schedule", default)
    if schedule == before.get("schedule") and "decay_steps" in before:
        kept["decay_steps"] = before["decay_steps"]
        if schedule == "wsd" and "decay_steps" not in changed:
            end = before.get("decay_end") or previous.config["train"]["steps"]
            # A decay that has not begun moves to the new end of the run; one that has begun stays where it is.
            kept["decay_end"] = end if previous.step > end - before["decay_steps"] else before.get("decay_end", 0)
    return {**stated, **{key: value for key, value in kept.items() if key not in changed}}

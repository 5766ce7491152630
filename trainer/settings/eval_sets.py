"""The setting `data.eval`: one blend of held-out data, or a table of several, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Blend = tuple[str, ...]  # "PREFIX" or "WEIGHT PREFIX" each
EvalSets = Blend | dict[str, Blend]

ACCEPTED = "a string, a list of strings, or a table of these by name"
NONE = "none"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def read_eval_sets(value: Any) -> EvalSets:
    """Parse `data.eval` as stated in a file. "none" is no data, also for a set of a table.

    Raises ValueError naming the setting, its value and what is accepted.
    """
    if not isinstance(value, Mapping):
        return _blend("data.eval", value)
    sets = {}
    for name, entries in value.items():
        setting = f"data.eval.{name}"
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"data.eval.{name!r}: the name of a set must have 1 to 64 letters, digits, - or _, and begin with a "
                "letter or digit: its figures are named eval_loss/NAME"
            )
        blend = _blend(setting, entries)
        if blend:
            sets[name] = blend
        elif entries != NONE:
            raise ValueError(f'{setting} = []: must name at least one PREFIX; "{NONE}" removes the set')
    return sets


def with_set(sets: EvalSets, name: str, blend: EvalSets) -> EvalSets:
    """`sets` with the set `name` added or replaced, or removed if `blend` is ()."""
    if isinstance(blend, dict):
        raise ValueError(f"data.eval.{name} = {blend!r}: must be a string or a list of strings")
    if not isinstance(sets, dict):
        if sets:
            raise ValueError(
                f"data.eval.{name}: data.eval is one blend without a name, {list(sets)}; name it in a table "
                f"[data.eval], or put --data.eval {NONE} before this"
            )
        sets = {}
    return read_eval_sets(sets | {name: list(blend) or NONE})


def _blend(setting: str, value: Any) -> Blend:
    if isinstance(value, str):
        return () if value == NONE else (value,)
    if isinstance(value, list | tuple) and all(type(entry) is str for entry in value):
        return tuple(value)
    raise ValueError(
        f"{setting} = {value!r}: must be {ACCEPTED if setting == 'data.eval' else 'a string or a list of strings'}"
    )

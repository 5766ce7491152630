"""Descriptions of settings, as metadata of their dataclass fields: the source of validation and reference tables."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

COUNT = 2**31 - 1  # maximum of settings without a natural bound


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Meaning of a setting and its accepted values."""

    help: str  # Markdown, one line
    least: float | None = None
    most: float | None = None
    above: float | None = None  # all accepted values are above it
    below: float | None = None  # all accepted values are below it
    off: bool = False  # 0 is accepted as well, and turns it off
    choices: tuple[str, ...] = ()
    default_means: str = ""  # the default in words, if its value is not telling

    def refusal(self, value: Any) -> str | None:
        """Return the accepted values, such as "must be at least 1", if `value` is not accepted; else None."""
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.least is None and self.above is None:
            return None
        is_high_enough = value >= self.least if self.least is not None else value > self.above
        is_low_enough = value < math.inf and not (
            (self.most is not None and value > self.most) or (self.below is not None and value >= self.below)
        )
        if (is_high_enough and is_low_enough) or (self.off and value == 0):
            return None
        return f"must be {self._range(is_high_enough)}"

    def _range(self, is_high_enough: bool) -> str:
        least, most = figure(self.least), figure(self.most)
        if self.off and self.least:
            return f"0 (off), or from {least} to {most}"
        if self.off:
            return "0 (off) or more" + (f", and at most {most}" if most else "")
        if self.above is not None:
            return f"above {figure(self.above)}"
        if self.below is not None:
            return f"at least {least} and below {figure(self.below)}"
        return f"at most {most}" if is_high_enough and most else f"at least {least}"


def about(help: str, **settings: Any) -> dict[str, Setting]:
    """Return the metadata of a field: `width: int = field(metadata=about("the residual stream", least=1))`."""
    return {"setting": Setting(help=help, **settings)}


def setting(default: Any, help: str, **settings: Any) -> Any:
    """Return a field with a default: `window: int = setting(1024, "keys that a query sees", least=1)`.

    A default of None is resolved later, from other settings or from the data.
    """
    return dataclasses.field(default=default, metadata=about(help, **settings))


def setting_of(field: dataclasses.Field) -> Setting:
    """Return the description of a field. KeyError if it has none."""
    found: Setting = field.metadata["setting"]
    return found


def figure(value: float | None) -> str:
    """Format a number as 1, 0.1 or 1e30, and None as an empty string."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:g}".replace("e+", "e")

"""How a setting describes itself: in the metadata of its dataclass field, from which validation and tables come."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

COUNT = 2**31 - 1  # most of what is only counted: far above what anybody means


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a setting means, and which values it takes."""

    help: str  # Markdown, one line
    least: float | None = None
    most: float | None = None
    above: float | None = None  # all accepted values are above it
    below: float | None = None  # all accepted values are below it
    off: bool = False  # 0 turns it off, and is accepted besides
    choices: tuple[str, ...] = ()
    default_means: str = ""  # in words, where the default does not say it

    def refusal(self, value: Any) -> str | None:
        """What is accepted, such as "must be at least 1", where `value` is not; None where it is."""
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
    """Metadata of a field: `width: int = field(metadata=about("the residual stream", least=1))`."""
    return {"setting": Setting(help=help, **settings)}


def setting(default: Any, help: str, **settings: Any) -> Any:
    """A field with a default: `window: int = setting(1024, "keys that a query sees", least=1)`.

    A default of None is filled in later, from other settings or from the data.
    """
    return dataclasses.field(default=default, metadata=about(help, **settings))


def setting_of(field: dataclasses.Field) -> Setting:
    """What `about` said of a field. KeyError where it said nothing."""
    found: Setting = field.metadata["setting"]
    return found


def figure(value: float | None) -> str:
    """A number as one writes it: 1, 0.1, 1e30; nothing for None."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:g}".replace("e+", "e")

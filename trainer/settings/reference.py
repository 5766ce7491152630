"""The settings reference in Markdown, generated from the metadata of the settings."""

from __future__ import annotations

import dataclasses

from griffin.parallel.setting import figure, setting_of
from griffin.trainer.settings.presets import FAMILIES, LADDER, RECURRENT_GEMMA
from griffin.trainer.settings.sections import SECTIONS, Config


def settings_reference() -> str:
    """A table for each section: key, default, meaning."""
    return "\n".join(_table(section) for section in dataclasses.fields(Config))


def _table(section: dataclasses.Field) -> str:
    rows = [f"| `preset` | | {_presets()} |"] if section.name == "model" else []
    for field in dataclasses.fields(SECTIONS[section.name]):
        default = _default(field)
        rows.append(f"| `{field.name}` |{f' {default} ' if default else ' '}| {setting_of(field).help} |")
    head = f"`[{section.name}]`: {setting_of(section).help}\n\n| key | default | meaning |\n|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _default(field: dataclasses.Field) -> str:
    words = setting_of(field).default_means
    if words or field.default is dataclasses.MISSING or field.default == ():
        return words
    if isinstance(field.default, tuple):
        return str(list(field.default))
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f'`"{field.default}"`' if isinstance(field.default, str) else figure(field.default)


def _presets() -> str:
    families, sizes, gemma = (
        [f"`{name}`" for name in names]
        for names in (
            [f"{family}-" for family in FAMILIES],
            LADDER,
            [f"recurrentgemma-{size}" for size in RECURRENT_GEMMA],
        )
    )
    return f"{_either(families)} with {_either(sizes)}; {', '.join(gemma)}"


def _either(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"

"""The README's reference and tree say what the code has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from griffin.trainer.settings.config import SECTIONS, TYPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("section", SECTIONS)
def test_settings_are_documented(section: str) -> None:
    (table,) = re.findall(rf"^`\[{section}\]`.*?\n\n\| key .*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    documented = [
        key for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for key in re.findall("`(.*?)`", row)
    ]
    assert sorted(documented) == sorted(TYPES[section])


@pytest.mark.parametrize("section", SECTIONS)
def test_documented_defaults(section: str) -> None:
    """Where the default stands as a value, it is the code's."""
    fields = {field.name: field.default for field in dataclasses.fields(SECTIONS[section])}
    checked = 0
    for key, default in re.findall(
        r"^\| `(\w+)` \| ([^|]*?) \|", README.split(f"\n`[{section}]`")[1].split("\n`[")[0], flags=re.MULTILINE
    ):
        if key not in fields or not re.fullmatch(r"[\d.e-]+|true|false|`\"\w+\"`", default):
            continue
        value = default.strip('`"')
        assert value in (str(fields[key]), str(fields[key]).lower()) or float(value) == fields[key], key
        checked += 1
    assert checked > 0 or section == "data"


def test_tree_names_what_exists() -> None:
    tree = README.split("## The house")[1].split("A reader follows")[0]
    folder, found = ROOT, 0
    for line in tree.splitlines():
        match = re.match(r"^(    |      )((?:[\w.]+/?  ?)+)", line)
        if not match:
            continue
        for name in match[2].split():
            base = ROOT if match[1] == "    " else folder
            assert (base / name).exists(), line
            found += 1
        if match[1] == "    ":
            folder = ROOT / match[2].split()[0]
    assert found > 30

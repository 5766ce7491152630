"""Settings describe themselves; the tables in documents are generated from these descriptions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from griffin.parallel.setting import Setting
from griffin.tools.cli import main
from griffin.trainer.settings.reference import settings_reference
from griffin.trainer.settings.sections import SECTIONS, SETTINGS, TYPES

ROOT = Path(__file__).parents[3]


def documented(text: str) -> str | None:
    """The tables of settings in a document, up to the next heading; None if it has none."""
    found = re.search(r"^`\[model\]`.*?(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return found[0].rstrip() + "\n" if found else None


def test_documents_are_fresh() -> None:
    files = {file.resolve() for file in (ROOT / "README.md", *ROOT.glob("[a-z]*/**/README.md"))}
    tables = {file: found for file in files if (found := documented(file.read_text(encoding="utf-8")))}
    assert len(tables) == 1, "one README.md has the settings' tables"
    for file, found in tables.items():
        assert found == settings_reference(), f"{file}: must have what `griffin train --help-settings` prints"


def test_help_settings_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help-settings"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == settings_reference()


@pytest.mark.parametrize("section", SECTIONS)
def test_reference_has_every_setting(section: str) -> None:
    table = settings_reference().split(f"`[{section}]`: ")[1].split("\n`[")[0]
    keys = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(keys) == sorted(TYPES[section])


@pytest.mark.parametrize(("name", "setting"), SETTINGS.items())
def test_settings_describe_themselves(name: str, setting: Setting) -> None:
    section, key = name.split(".")
    default = getattr(SECTIONS[section], key, "")
    assert setting.help
    assert "|" not in setting.help
    assert "\n" not in setting.help
    assert default is not None or setting.default_means, "says where its default comes from"
    for choice in setting.choices:
        assert choice == default or f'`"{choice}"`' in setting.help, choice
    if TYPES[section][key] in (int, float):
        assert setting.least is not None or setting.above is not None
        assert default is None or default == "" or setting.refusal(default) is None
    if TYPES[section][key] is int:
        assert setting.most is not None


@pytest.mark.parametrize(
    ("setting", "accepted", "refused"),
    [
        ({"least": 1, "most": 9}, [1, 9], {0: "at least 1", 10: "at most 9", -(10**400): "at least 1"}),
        ({"above": 0.0}, [1e-300, 1e300], {0.0: "above 0", float("inf"): "above 0", float("nan"): "above 0"}),
        ({"least": 0.0, "below": 1.0}, [0, 0.5], {1.0: "at least 0 and below 1", -0.1: "at least 0 and below 1"}),
        ({"least": 0.0, "off": True}, [0, 5.0], {-1.0: "0 (off) or more", float("inf"): "0 (off) or more"}),
        (
            {"least": 0.0, "most": 1e30, "off": True},
            [0, 1e30],
            {1e31: "0 (off) or more, and at most 1e30", float("nan"): "0 (off) or more, and at most 1e30"},
        ),
        ({"least": 1.0, "most": 604800.0, "off": True}, [0, 1, 5e5], {0.5: "0 (off), or from 1 to 604800"}),
        ({"least": 1.0}, [1.0], {0.9: "at least 1", float("inf"): "at least 1"}),
        ({"choices": ("a", "b")}, ["a"], {"c": "one of a, b"}),
        ({}, ["anything", True, ()], {}),
    ],
)
def test_refusals(setting: dict, accepted: list, refused: dict) -> None:
    found = Setting(help="", **setting)
    assert [found.refusal(value) for value in accepted] == [None] * len(accepted)
    assert {value: found.refusal(value) for value in refused} == {
        key: f"must be {text}" for key, text in refused.items()
    }

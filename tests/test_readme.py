"""The README's tree says what the code has."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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

"""The project's documents, taken apart: blocks of code, links, headings and tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "parallel", "trainer", "tools", "launch", "tests")
READMES = [ROOT / "README.md", *sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("README.md"))]
DOCUMENTS = [*READMES, *(ROOT / name for name in ("BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md"))]

_FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block of a document."""

    document: Path
    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [Block(document, *match.groups()) for match in _FENCED.finditer(text)]


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return _FENCED.sub("", document.read_text(encoding="utf-8"))


def links(document: Path) -> list[str]:
    """Where a document's links lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(document))


def headings(document: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE)


def anchors(document: Path) -> dict[str, str]:
    """A document's headings by what links name them, as GitHub makes it of them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): heading for heading in headings(document)}


def section(document: Path, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    text = prose(document)
    (start,) = re.finditer(rf"^(#+) {re.escape(heading)}$", text, flags=re.MULTILINE)
    end = re.compile(rf"^#{{1,{len(start[1])}}} ", re.MULTILINE).search(text, start.end())
    return text[start.end() : end.start() if end else len(text)]


def first_cells(text: str) -> list[str]:
    """The first cell of every row of a text's tables, without their heads."""
    rows = re.findall(r"^\| *(.*?) *\|", text, flags=re.MULTILINE)
    return [cell for cell, after in zip(rows, [*rows[1:], ""], strict=True) if "---" not in (cell[:3], after[:3])]

"""megatron-core's internals are used in one module, whose docstring names their lines in the pinned version."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from griffin.trainer import sharded_optimizer

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "trainer" / "sharded_optimizer.py"


def listed() -> list[tuple[str, int, str]]:
    """(file, line, name) of every internal that the module's docstring names."""
    found, file = [], ""
    for line in (sharded_optimizer.__doc__ or "").splitlines():
        if re.fullmatch(r"\w+/\w+\.py", line):
            file = line
        elif match := re.fullmatch(r" {4}(\d+) (\w+): .*", line):
            found.append((file, int(match[1]), match[2]))
    return found


INTERNALS = listed()


@pytest.mark.parametrize(("file", "line", "name"), INTERNALS, ids=[name for *_, name in INTERNALS])
def test_internals_are_at_the_lines_in_the_docstring(file: str, line: int, name: str) -> None:
    spec = find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / file).read_text().splitlines()[line - 1]
    assert re.search(rf"(def |self\.){name}\b", text), f"{file}:{line} is {text!r}"


def attributes(file: Path) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}


def test_internals_are_used_in_one_module() -> None:
    names = {name for *_, name in INTERNALS}
    # Those that other libraries' objects have as well.
    common = {"buffers", "buckets"}
    assert names <= attributes(MODULE), "each one is used"
    others = [
        file for floor in ("kernels", "parallel", "trainer", "tools", "launch") for file in (ROOT / floor).rglob("*.py")
    ]
    assert len(others) > 100
    for file in others:
        if file != MODULE:
            assert not (names - common) & attributes(file), file


def test_no_other_private_name_of_an_optimizer_or_buffer_is_used() -> None:
    """Private attributes must be those of `self` or of this module's classes, or be listed."""
    own = {
        node.attr
        for node in ast.walk(ast.parse(MODULE.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    private = {name for name in attributes(MODULE) if name.startswith("_")} - own
    assert private == {name for *_, name in INTERNALS if name.startswith("_")}

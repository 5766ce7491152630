"""The structure of the code: imports point one way on every level, without circles; folders and files stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# By top-level folder: those that it may import. `trainer.settings` and `data` describe runs that `launch` starts.
LAYERS = {
    "kernels": set(),
    "parallel": {"kernels"},
    "launch": {"parallel"},
    "trainer": {"parallel", "kernels"},
    "tools": {"trainer", "launch", "parallel", "kernels"},
}
MOST_FILES, MOST_LINES = 14, 400


def modules() -> dict[str, Path]:
    """Every module of the product, such as "trainer.run.folder", and its file."""
    files = (file for layer in LAYERS for file in (ROOT / layer).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def imported(file: Path) -> Iterator[str]:
    """The modules of the product that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found = [name.removeprefix("griffin.") for name in names if name.startswith("griffin.")]
        yield from (name for name in found if name in MODULES)


def is_package(name: str) -> bool:
    return MODULES[name].name == "__init__.py"


def imports() -> dict[str, set[str]]:
    """By module. An import from a package's folder is that of a module in it, where it is one."""
    graph = {}
    for name, file in MODULES.items():
        found = set(imported(file)) - {name}
        graph[name] = {
            each for each in found if not (is_package(each) and any(o.startswith(f"{each}.") for o in found))
        }
    return graph


IMPORTS = imports()


def folder_of(name: str) -> str:
    """The folder of a module, such as "trainer.run"; a module of a top-level folder stands for itself."""
    folder = ".".join(MODULES[name].relative_to(ROOT).parts[:-1])
    return name if folder in LAYERS else folder


def assert_no_circle(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' -> '.join(reversed(error.args[1]))}")


def test_files_import_in_no_circle() -> None:
    assert_no_circle(IMPORTS)


def test_folders_import_in_no_circle() -> None:
    folders: dict[str, set[str]] = {}
    for name, found in IMPORTS.items():
        # Subfolders stand between the files of their folder: `checkpoint.checkpoints` -> `saving` -> `checkpoint.plan`.
        outside = {folder_of(each) for each in found if not is_within(folder_of(each), folder_of(name))}
        folders.setdefault(folder_of(name), set()).update(outside)
    assert_no_circle(folders)


def is_within(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def test_layers_import_those_below() -> None:
    for name, found in IMPORTS.items():
        layer = name.partition(".")[0]
        for each in found:
            assert each.partition(".")[0] in LAYERS[layer] | {layer}, f"{name} imports {each}"


def test_commands_are_the_top_of_the_tools() -> None:
    """common <- the other folders <- commands <- cli."""
    for name, found in IMPORTS.items():
        for each in found:
            if name.startswith("tools.") and each.startswith("tools."):
                assert height(each) <= height(name), f"{name} imports {each}"


def height(name: str) -> int:
    return {"common": 0, "commands": 2, "cli": 3}.get(name.split(".")[1], 1)


def test_rules_of_this_test_can_fail() -> None:
    with pytest.raises(pytest.fail.Exception, match="circle"):
        assert_no_circle({"a": {"b"}, "b": {"a"}})
    assert "trainer.step" in IMPORTS["trainer.loop"]
    assert len(MODULES) > 100


def test_folders_and_files_are_small() -> None:
    for folder in {file.parent for file in MODULES.values()}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder
    long = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES} == {}


@cache
def code_of_tests() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("*.py")}


def test_tests_import_no_test_module() -> None:
    """What several need is a module of its own, which is collected by none."""
    found = []
    for file, code in code_of_tests().items():
        for node in ast.walk(code):
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            found += [f"{file}: {name}" for name in names if is_test_module(name)]
    assert found == []
    assert is_test_module("tests.test_structure")


PATCHES = {"patch", "object", "setattr", "delattr"}  # the methods of pytest's MonkeyPatch and of unittest.mock


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Uses of the product's private names in a test: imported, read from a module or class, or patched. Also patches
    of any of its names by a string path, which a rename does not find."""
    product = [
        alias
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "griffin"
    ]
    yield from (alias.name for alias in product if is_private(alias.name))
    names = {alias.asname or alias.name for alias in product}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in names:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and node.args and getattr(node.func, "attr", "") in PATCHES:
            target, *others = node.args
            texts = [each.value for each in ast.walk(target) if isinstance(each, ast.Constant)]
            name = str(others[0].value) if others and isinstance(others[0], ast.Constant) else ""
            if isinstance(target, ast.JoinedStr) or any(str(text).startswith("griffin.") for text in texts):
                yield ast.unparse(target)
            elif is_private(name):
                yield f"{ast.unparse(target)}.{name}"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from griffin.trainer.step import Training, _loss", "_loss"),
        ("from griffin.trainer import step as s\ns._loss(1)", "s._loss"),
        ("import griffin.trainer.step\ngriffin.trainer.step._loss(1)", "griffin.trainer.step._loss"),
        ("from griffin.trainer.step import Training\nTraining._run()", "Training._run"),
        ("patch.setattr(step, '_loss', 1)", "step._loss"),
        ("mock.patch.object(Training, '_run', f)", "Training._run"),
        ("monkeypatch.setattr('griffin.trainer.step.Training', f)", "'griffin.trainer.step.Training'"),
        ("mock.patch(f'{module}.loss')", "f'{module}.loss'"),
    ],
)
def test_private_names_are_found(code: str, found: str) -> None:
    assert list(private_uses(ast.parse(code))) == [found]


def test_tests_use_public_names() -> None:
    found = [f"{file}: {name}" for file, code in code_of_tests().items() for name in private_uses(code)]
    assert found == []
    accepted = "patch.setattr(step, 'loss', 1)\nself._x = step.__name__\nmock.patch('os.fsync', f)"
    assert list(private_uses(ast.parse(accepted))) == []


def is_test_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return name.startswith("tests.") and path.name.startswith("test_") and path.is_file()

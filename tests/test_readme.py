"""What documents say of the code is what the code has; their links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from griffin.parallel.config import ATTENTION, RECURRENT
from griffin.parallel.world.ranks import HUNG, STOPPED
from griffin.tools.cli import COMMANDS
from griffin.tools.weights.imported import model_tensors
from griffin.trainer.checkpoint.arrays import KINDS
from griffin.trainer.checkpoint.manifest import MANIFEST_KEYS
from griffin.trainer.settings.load import CONFIGS
from griffin.trainer.settings.presets import preset
from tests.documents import DOCUMENTS, FOLDERS, READMES, ROOT, anchors, first_cells, headings, links, name_of, section

TRAINER = ROOT / "trainer/README.md"
CHECKPOINT = ROOT / "trainer/checkpoint/README.md"
MOST_LINES = 150  # of the first page

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def names(cell: str) -> list[str]:
    return re.findall("`(.*?)`", cell)


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{name_of(document)}: {link}"
        assert target.is_relative_to(ROOT), f"{name_of(document)}: {link} leads out of the project"
        assert not anchor or anchor in anchors(target), f"{name_of(document)}: {link}"


@each_document
def test_paths_of_the_project_exist(document: Path) -> None:
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{name_of(document)}: {path}"


@each_document
def test_headings_differ(document: Path) -> None:
    """So that each has an anchor of its own."""
    assert len(anchors(document)) == len(headings(document))


def test_first_page() -> None:
    first, linked = ROOT / "README.md", set()
    assert len(first.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    for document in (first, *READMES):  # in two clicks
        linked |= {(document.parent / link.partition("#")[0]).resolve() for link in links(document)}
    assert linked >= {*DOCUMENTS} - {first}
    assert len(READMES) == 9
    everywhere = {heading for document in READMES for heading in headings(document)}
    searched = {"Quick start", "Features", "Installation", "Usage", "Resuming", "Settings reference"}
    assert everywhere >= searched | {"Repository layout", "Exit codes", "Format", "Run folder"}


def test_manifest_is_documented() -> None:
    documented = [key for cell in first_cells(section(CHECKPOINT, "Manifest")) for key in names(cell)]
    assert sorted(documented) == sorted(["checksum", "format", *MANIFEST_KEYS[0]])


def test_arrays_are_documented() -> None:
    """Every kind of array, and every tensor of a model that has all of them; "." stands for the block's part before."""
    kinds, tensors, known = [], set(), "of no model"
    for cell in first_cells(section(CHECKPOINT, "Arrays")):
        for name in names(cell):
            if name.endswith(".NAME"):
                kinds.append(name.removesuffix(".NAME"))
                continue
            known = known if name.startswith(".") else ".".join(name.split(".")[:3])
            tensors.add(f"{known}{name}" if name.startswith(".") else name)
    model = dataclasses.replace(preset("griffin-100m"), pattern=(RECURRENT, ATTENTION))
    assert kinds == list(KINDS)
    assert tensors == {re.sub(r"blocks\.\d+", "blocks.I", tensor.name) for tensor in model_tensors(model)}


def test_exit_codes_are_documented() -> None:
    for document in (TRAINER, ROOT / "launch/README.md"):
        assert {"0", str(STOPPED), str(HUNG)} <= set(first_cells(section(document, "Exit codes")))


def test_commands_are_documented() -> None:
    listed = first_cells((ROOT / "tools/README.md").read_text(encoding="utf-8").split("\n## ")[0])
    assert sorted(re.findall(r"`griffin (\w+)`", " ".join(listed))) == sorted(COMMANDS)


def test_ready_configurations_are_documented() -> None:
    listed = " ".join(first_cells(section(TRAINER, "Configuration files")))
    assert sorted(re.findall(r"\[(.*?)\]", listed)) == sorted(file.stem for file in CONFIGS.glob("*.toml"))

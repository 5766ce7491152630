"""What documents say of the code is what the code has; their links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from griffin.parallel.config import ATTENTION, RECURRENT
from griffin.parallel.world.ranks import HUNG, STOPPED
from griffin.tools.cli import COMMANDS
from griffin.tools.weights.imported import model_tensors
from griffin.trainer.checkpoint.arrays import KINDS
from griffin.trainer.checkpoint.manifest import Manifest
from griffin.trainer.settings.load import CONFIGS
from griffin.trainer.settings.presets import preset
from tests.documents import DOCUMENTS, FOLDERS, READMES, ROOT, anchors, first_cells, headings, links, name_of, section

TRAINER = ROOT / "trainer/README.md"
CHECKPOINT = ROOT / "trainer/checkpoint/README.md"
MOST_LINES = 150  # of the first page

FIRST = ROOT / "README.md"
LARGEST_PICTURE = 60_000  # bytes

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
    assert len(FIRST.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    assert {ROOT / link.partition("#")[0] for link in links(FIRST)} >= {*DOCUMENTS} - {FIRST}  # one click away
    assert len(READMES) == 9
    everywhere = {heading for document in READMES for heading in headings(document)}
    searched = {"Quick start", "Features", "Installation", "Usage", "Resuming", "Settings reference"}
    assert everywhere >= searched | {"Repository layout", "Exit codes", "Format", "Run folder"}


def test_picture_of_the_first_page() -> None:
    (picture,) = re.findall(r"!\[[^\]]+\]\((.*?)\)", FIRST.read_text(encoding="utf-8"))
    drawn = (ROOT / picture).read_text(encoding="utf-8")
    assert picture.endswith(".svg")
    assert len(drawn) < LARGEST_PICTURE
    assert "fill: #ffffff" in drawn  # it reads on a dark page, too
    assert all(f"<!-- {title} -->" in drawn for title in ("loss (nats per token)", "tokens", "training time (s)"))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Learning-rate schedule", "[optimizer.py](optimizer.py)"),
        ("HGRN", "`MIXERS`"),
        ("HGRN", "`reference.py`"),
        ("evaluation", "`evaluations`"),
        ("axis", "to `AXES`"),
        ("a command", "`COMMANDS`"),
        ("a setting", "settings/sections.py"),
        ("File formats", "`manifest.json`"),
        ("86", "the run [hung](#hangs)"),
        ("Weights", "RecurrentGemma"),
        ("Triton programs", "recurrence/plan.py"),
        ("Which kernel", "selection.py"),
        ("data_parallel_imbalance", "`data_parallel_imbalance` |"),
    ],
)
def test_first_page_leads_to_answers(question: str, answer: str) -> None:
    """In one click, to a section that has the answer."""
    rows = [line for line in section(FIRST, "Where to find things").splitlines() if question in line]
    assert len(rows) == 1
    targets = [link.partition("#") for link in re.findall(r"\]\((.*?)\)", rows[0])]
    sections = [section(ROOT / path, anchors(ROOT / path)[anchor]) for path, _, anchor in targets if anchor]
    assert any(answer in text for text in sections)


def test_manifest_is_documented() -> None:
    documented = [key for cell in first_cells(section(CHECKPOINT, "Manifest")) for key in names(cell)]
    assert sorted(documented) == sorted(["checksum", "format", *(field.name for field in dataclasses.fields(Manifest))])


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


def test_make_lists_its_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert re.findall(r"^make (\S+) +\S", listed, flags=re.MULTILINE) == targets.split()


def test_ready_configurations_are_documented() -> None:
    listed = " ".join(first_cells(section(TRAINER, "Configuration files")))
    assert sorted(re.findall(r"\[(.*?)\]", listed)) == sorted(file.stem for file in CONFIGS.glob("*.toml"))

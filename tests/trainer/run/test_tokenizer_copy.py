"""A run's folder keeps its data's tokenizer: copied once, never replaced, and used where the original is gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from griffin.tools.cli import main
from griffin.tools.inference.prompts import find_prompt_tokenizer
from griffin.trainer.checkpoint.manifest import read_manifest
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.tokenizer_copy import copy_tokenizer, find_tokenizer
from griffin.trainer.settings.complete import load_config
from tests.ranks import RankPool
from tests.small_runs import metrics, run, snapshot, write_config

WORDS = ("<pad>", "<the-end>", "a", "b")


def save_tokenizer(path: Path, *, last: str = "b") -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate((*WORDS[:-1], last))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def build(prefix: Path, tokenizer: Path, text: str = "a b b a " * 500) -> Path:
    """A tokenizer whose end-of-document token has none of the usual names."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    (prefix.parent / "text.txt").write_text(text)
    files = [str(prefix), str(prefix.parent / "text.txt")]
    assert main(["data", "build", *files, "--tokenizer", str(tokenizer), "--eod", "<the-end>"]) == 0
    return prefix


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "original" / "mine.json")


@pytest.fixture
def prefix(tmp_path: Path, original: Path) -> Path:
    return build(tmp_path / "data" / "train", original)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    path = tmp_path / "run"
    path.mkdir()
    return RunFolder(path)


def step(folder: RunFolder) -> Path:
    return folder.checkpoints / "step-00000001"


def change(original: Path, prefix: Path) -> None:
    save_tokenizer(original, last="c")


def lose(original: Path, prefix: Path) -> None:
    original.unlink()


def lose_all(original: Path, prefix: Path) -> None:
    shutil.rmtree(original.parent)
    shutil.rmtree(prefix.parent)


@pytest.mark.parametrize("lost", [change, lose, lose_all])
def test_copy_replaces_a_missing_tokenizer(
    folder: RunFolder, original: Path, prefix: Path, lost: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, content = [f"2.0 {prefix}"], original.read_bytes()
    assert copy_tokenizer(folder, entries) is None
    assert sorted(file.name for file in folder.path.iterdir()) == ["tokenizer"], "nothing unfinished is left"
    assert (folder.tokenizer / "tokenizer.json").read_bytes() == content
    assert find_tokenizer(step(folder), entries).spec == str(original), "while it is there"
    lost(original, prefix)
    found = find_tokenizer(step(folder), entries)
    assert (found.spec, found.eod) == (str(folder.tokenizer / "tokenizer.json"), 1)
    assert found.encode("b a").tolist() == [3, 2]
    monkeypatch.chdir(folder.path)
    assert find_tokenizer(Path("checkpoints/step-00000001"), entries).eod == 1
    with pytest.raises(ValueError, match=r"is missing|no such file|is not the tokenizer"):
        find_tokenizer(folder.path / "elsewhere" / "step-00000001", entries)


def test_later_attempt_keeps_the_copy(folder: RunFolder, tmp_path: Path, original: Path, prefix: Path) -> None:
    assert copy_tokenizer(folder, [str(prefix)]) is None
    before = snapshot(folder.path)
    assert copy_tokenizer(folder, [str(prefix)]) is None
    original.unlink()
    assert copy_tokenizer(folder, [str(prefix)]) is None, "there is a copy"
    other = build(tmp_path / "other" / "train", save_tokenizer(tmp_path / "other.json", last="c"))
    said = copy_tokenizer(folder, [str(other)])
    assert said is not None
    assert "holds another one than that of the data; it is left as it is" in said
    assert snapshot(folder.path) == before
    assert find_tokenizer(step(folder), [str(other)]).spec == str(tmp_path / "other.json")
    for gone in (tmp_path / "other.json", tmp_path / "other" / "train.json"):
        gone.unlink()
        with pytest.raises(ValueError, match=r"run/tokenizer is not known to be the one of data '.*other/train'"):
            find_tokenizer(step(folder), [str(other)])


@pytest.mark.parametrize(
    ("lost", "reason"),
    [(change, "is not the tokenizer that"), (lose, "No such file"), (lose_all, "train.json is missing")],
)
def test_missing_tokenizer_is_no_error(
    folder: RunFolder, original: Path, prefix: Path, lost: Callable[[Path, Path], None], reason: str
) -> None:
    lost(original, prefix)
    said = copy_tokenizer(folder, [str(prefix)])
    assert said is not None
    assert said.startswith("Tokenizer: not copied to the run folder (")
    assert reason in said
    assert not list(folder.path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_error(folder: RunFolder, prefix: Path) -> None:
    said = copy_tokenizer(RunFolder(folder.path / "gone"), [str(prefix)])
    assert said is not None
    assert "No such file or directory" in said


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "griffin-tokenizer-1", "tokenizer": 1, "eod_token": 2}', "[" * 10**5]
)
def test_a_damaged_description(folder: RunFolder, original: Path, prefix: Path, text: str) -> None:
    copy_tokenizer(folder, [str(prefix)])
    (folder.tokenizer / "description.json").write_text(text)
    said = copy_tokenizer(folder, [str(prefix)])
    assert said is not None
    assert "description.json is damaged" in said
    original.unlink()
    with pytest.raises(ValueError, match=r"description\.json is damaged"):
        find_tokenizer(step(folder), [str(prefix)])


def test_a_damaged_copy(folder: RunFolder, original: Path, prefix: Path) -> None:
    copy_tokenizer(folder, [str(prefix)])
    original.unlink()
    save_tokenizer(folder.tokenizer / "tokenizer.json", last="c")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer that description\.json beside it"):
        find_tokenizer(step(folder), [str(prefix)])


def test_run_copies_its_tokenizer_and_generates(
    rank_pool: RankPool, original: Path, prefix: Path, tmp_path: Path
) -> None:
    settings = {"data.train": [str(prefix)], "data.eval": [], "model.vocabulary": 257}
    overrides = [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value))]
    config = load_config(write_config(tmp_path), [*overrides, "--train.steps", "2", "--train.eval_interval", "0"])
    run_dir = tmp_path / "run"
    rank_pool.run(run, 1, config, run_dir)
    assert [line["step"] for line in metrics(run_dir) if "loss" in line] == [1, 2]
    lose_all(original, prefix)
    folder = run_dir / "checkpoints" / "step-00000002"
    prompt_tokenizer = find_prompt_tokenizer(folder, read_manifest(folder))
    assert prompt_tokenizer.encode("a b", 257, "here") == [2, 3]
    assert prompt_tokenizer.stops == {1}

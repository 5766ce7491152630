"""A checkpoint's tokenizer, and its BOS and stop tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from griffin.tools.cli import main
from griffin.tools.inference.prompts import PromptTokenizer, find_prompt_tokenizer
from griffin.trainer.checkpoint.manifest import Manifest
from griffin.trainer.data.tokenizer import ByteTokenizer, load_tokenizer

MANIFEST = Manifest(
    step=0,
    samples=0,
    attempt=1,
    created="",
    config={"data": {"train": []}},
    layout={},
    optimizer=None,
    random={},
    arrays={},
    files={},
)


def save_tokenizer(folder: Path, *, end: str = "<eos>") -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ("<pad>", end, "<bos>", "<turn>", "a", "b")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(words[:4]))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def train_sentencepiece(folder: Path) -> Path:
    from sentencepiece import SentencePieceTrainer

    (folder / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 20)
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "pieces"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "pieces.model"


def converted_checkpoint(folder: Path, *, end: str = "<eos>", **files: dict[str, Any]) -> Path:
    """Make a checkpoint folder with the auxiliary files of its source model; `files` by name without ".json"."""
    save_tokenizer(folder / "source", end=end)
    for name, values in files.items():
        (folder / "source" / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("files", "bos", "stops"),
    [
        ({"config": {"bos_token_id": 2, "eos_token_id": 1}}, 2, {1}),
        ({"config": {"bos_token_id": 2, "eos_token_id": 1}, "generation_config": {"eos_token_id": [1, 3]}}, 2, {1, 3}),
        ({"config": {"bos_token_id": None, "eos_token_id": None}}, None, {1}),
        ({"config": {"bos_token_id": 2}, "generation_config": {"bos_token_id": None, "eos_token_id": 3}}, 2, {3}),
        ({}, None, {1}),
    ],
)
def test_special_tokens_of_a_converted_model(tmp_path: Path, files: dict, bos: int | None, stops: set[int]) -> None:
    prompt_tokenizer = find_prompt_tokenizer(converted_checkpoint(tmp_path, **files), MANIFEST)
    assert (prompt_tokenizer.bos, prompt_tokenizer.stops) == (bos, stops)
    begin = [] if bos is None else [bos]
    assert prompt_tokenizer.encode("<turn> a b", 6, "here") == [*begin, 3, 4, 5]
    if bos is not None:
        assert prompt_tokenizer.encode("<bos> a", 6, "here") == [2, 4], "stated by the prompt itself"


def test_an_end_token_of_another_name(tmp_path: Path) -> None:
    folder = converted_checkpoint(tmp_path, end="<the-end>", tokenizer_config={"eos_token": {"content": "<the-end>"}})
    assert find_prompt_tokenizer(folder, MANIFEST).stops == {1}


def test_a_trained_model_has_the_tokenizer_of_its_data(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    assert main(["data", "build", str(tmp_path / "data"), str(tmp_path / "text.txt"), "--tokenizer", "bytes"]) == 0
    manifest = replace(MANIFEST, config={"data": {"train": [str(tmp_path / "data")]}})
    prompt_tokenizer = find_prompt_tokenizer(tmp_path, manifest)
    assert (prompt_tokenizer.tokenizer.spec, prompt_tokenizer.bos, prompt_tokenizer.stops) == ("bytes", None, {256})
    (tmp_path / "data.bin").unlink()
    assert find_prompt_tokenizer(tmp_path, manifest).stops == {256}, "the tokens themselves may be elsewhere"
    (tmp_path / "data.json").unlink()
    with pytest.raises(ValueError, match=r"data\.json is missing .*; or name the tokenizer with --tokenizer FILE"):
        find_prompt_tokenizer(tmp_path, manifest)


def test_a_stated_tokenizer_comes_first(tmp_path: Path) -> None:
    folder = converted_checkpoint(tmp_path, config={"bos_token_id": 2, "eos_token_id": 1})
    prompt_tokenizer = find_prompt_tokenizer(folder, MANIFEST, "bytes")
    assert (prompt_tokenizer.tokenizer.spec, prompt_tokenizer.bos, prompt_tokenizer.stops) == ("bytes", 2, {1})
    prompt_tokenizer = find_prompt_tokenizer(tmp_path / "none", MANIFEST, str(folder / "source" / "tokenizer.json"))
    assert (prompt_tokenizer.bos, prompt_tokenizer.stops) == (None, {1})


def test_a_stated_end_token(tmp_path: Path) -> None:
    folder = converted_checkpoint(tmp_path, end="<the-end>")
    with pytest.raises(ValueError, match="name its end-of-document token with --eod TOKEN"):
        find_prompt_tokenizer(folder, MANIFEST)
    assert find_prompt_tokenizer(folder, MANIFEST, eod="<the-end>").stops == {1}


@pytest.mark.parametrize("value", ["2", [], [1, None], True])
def test_invalid_token_ids(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"eos_token_id = .* must be an integer or some"):
        find_prompt_tokenizer(converted_checkpoint(tmp_path, config={"eos_token_id": value}), MANIFEST)


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    folder = converted_checkpoint(tmp_path)
    (folder / "source" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"source/config\.json: must be a JSON object"):
        find_prompt_tokenizer(folder, MANIFEST)


def test_text_of_an_answer() -> None:
    """The text of an answer excludes the stop token, and ids beyond the tokenizer's vocabulary."""
    prompt_tokenizer = PromptTokenizer(ByteTokenizer(), None, frozenset({256}))
    assert prompt_tokenizer.decode([32], [104, 105, 256]) == "hi"
    assert prompt_tokenizer.decode([], [104, 300, 105]) == "hi"
    assert prompt_tokenizer.decode([32], []) == ""
    assert prompt_tokenizer.decode([0xC3], [0xA9]) == "\ufffd", "what a prompt has cut in two is no text"


def test_an_answer_keeps_the_space_that_it_begins_with(tmp_path: Path) -> None:
    prompt_tokenizer = PromptTokenizer(load_tokenizer(str(train_sentencepiece(tmp_path))), None, frozenset())
    prompt, both = (prompt_tokenizer.tokenizer.encode(text).tolist() for text in ("one two", "one two three"))
    assert both[: len(prompt)] == prompt
    assert prompt_tokenizer.tokenizer.decode(both[len(prompt) :]) == "three"
    assert prompt_tokenizer.decode(prompt, both[len(prompt) :]) == " three"


def test_a_sentencepiece_model_alone_defines_bos(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    train_sentencepiece(tmp_path).rename(tmp_path / "source" / "tokenizer.model")
    prompt_tokenizer = find_prompt_tokenizer(tmp_path, MANIFEST)
    assert (prompt_tokenizer.bos, prompt_tokenizer.stops) == (2, {1})
    assert prompt_tokenizer.encode("one", 100, "here")[0] == 2

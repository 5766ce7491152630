"""The setting data.eval: one blend, or several held-out sets by name, in a file and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from griffin.tools.cli import split_overrides
from griffin.trainer.run.folder import changed_settings
from griffin.trainer.settings.complete import load_config, read_data
from griffin.trainer.settings.load import to_toml
from griffin.trainer.settings.sections import Config, DataConfig
from tests.data_sets import write_prefix

MODEL = '[model]\npreset = "hawk-100m"\nvocabulary = 100\n[data]\ntrain = "a"\n'
TABLE = '[data.eval]\nbooks = "b"\ncode = ["0.7 c", "0.3 d"]\n'


def load(folder: Path, text: str, *words: str) -> Config:
    (folder / "c.toml").write_text(MODEL + text)
    return load_config(folder / "c.toml", split_overrides(list(words))[1])


def test_a_string_or_list_is_one_blend_without_a_name(tmp_path: Path) -> None:
    assert load(tmp_path, 'eval = "b"\n').data.eval_sets == {"": ("b",)}
    assert load(tmp_path, 'eval = ["b", "c"]\n').data.eval_sets == {"": ("b", "c")}
    for text in ("", 'eval = "none"\n', "eval = []\n", "[data.eval]\n"):
        assert load(tmp_path, text).data.eval_sets == {}


def test_a_table_names_several_sets(tmp_path: Path) -> None:
    config = load(tmp_path, TABLE)
    assert config.data.eval_sets == {"books": ("b",), "code": ("0.7 c", "0.3 d")}
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        (TABLE, ["--data.eval.books", "0.5 x", "0.5 y"], {"books": ("0.5 x", "0.5 y"), "code": ("0.7 c", "0.3 d")}),
        (TABLE, ["--data.eval.news=x", "--data.eval.code", "none"], {"books": ("b",), "news": ("x",)}),
        (TABLE, ["--data.eval", "x"], {"": ("x",)}),
        (TABLE, ["--data.eval", "none"], {}),
        (TABLE, ["--data.eval", "none", "--data.eval.news", '["x", "y"]'], {"news": ("x", "y")}),
        ("", ["--data.eval.news", "x"], {"news": ("x",)}),
        ('eval = "b"\n', ["--data.eval", '{news = "x"}'], {"news": ("x",)}),
    ],
)
def test_sets_on_the_command_line(
    tmp_path: Path, text: str, words: list[str], expected: dict[str, tuple[str, ...]]
) -> None:
    assert load(tmp_path, text, *words).data.eval_sets == expected


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ('[data.eval]\n"a b" = "x"\n', [], r"data\.eval\.'a b': the name of a set must have 1 to 64 letters"),
        ('[data.eval]\n"a/b" = "x"\n', [], r"data\.eval\.'a/b': the name of a set"),
        ("[data.eval]\n-a = 'x'\n", [], r"data\.eval\.'-a': the name of a set"),
        ("[data.eval]\na = []\n", [], r"data\.eval\.a = \[\]: must name at least one PREFIX"),
        ("[data.eval]\na = 3\n", [], r"data\.eval\.a = 3: must be a string or a list of strings$"),
        ("[data.eval]\na = [1]\n", [], r"data\.eval\.a = \[1\]: must be a string or a list of strings$"),
        ("[data.eval.a]\nb = 'x'\n", [], r"data\.eval\.a = \{'b': 'x'\}: must be a string or a list of strings$"),
        ("eval = 3\n", [], r"data\.eval = 3: must be a string, a list of strings, or a table of these by name"),
        ('eval = "b"\n', ["--data.eval.a", "x"], r"data\.eval\.a: data\.eval is one blend without a name, \['b'\]"),
        ("", ["--data.eval.a.b", "x"], r"data\.eval\.'a\.b': the name of a set"),
        ("", ["--data.eval.", "x"], r"data\.eval\.: no such setting"),
        ("", ["--data.train.a", "x"], r"data\.train\.a: no such setting"),
        ('"eval.a" = "x"\n', [], r"data\.eval\.a: no such setting"),
        ("", ["--data.eval.a"], r"--data\.eval\.a: needs a value, a string, a list of strings, or a table"),
    ],
)
def test_refusals(tmp_path: Path, text: str, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text, *words)


def test_all_sets_are_read_and_have_one_tokenizer(tmp_path: Path) -> None:
    train, books = (write_prefix(tmp_path / name, [[1, 2, 3]]) for name in ("train", "books"))
    other = write_prefix(tmp_path / "other", [[1, 2, 3]], vocabulary=200, eod=199)
    found = read_data(DataConfig(train=(train,), eval={"books": (books,), "again": (train,)}))
    assert [info.prefix for info in found] == [train, books, train]
    with pytest.raises(ValueError, match=r"data\.eval\.code = '.*other': built with tokenizer .* data\.train with"):
        read_data(DataConfig(train=(train,), eval={"books": (books,), "code": (other,)}))
    with pytest.raises(ValueError, match=r"data\.eval = '.*other': built with tokenizer"):
        read_data(DataConfig(train=(train,), eval=(other,)))


def test_changed_held_out_sets(tmp_path: Path) -> None:
    config = load(tmp_path, TABLE)
    previous = {"eval": {"books": ["b"], "code": ["0.7 c", "0.3 d"]}, "train": ["a"]}  # as JSON has it
    told = [text for text in changed_settings(config, {"data": previous}) if text.startswith("data.")]
    assert told == []
    told = [text for text in changed_settings(config, {"data": previous | {"eval": ["b"]}}) if text.startswith("data.")]
    assert told == ['data.eval ["b"] -> {"books": ["b"], "code": ["0.7 c", "0.3 d"]}']

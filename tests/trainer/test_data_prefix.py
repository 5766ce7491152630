"""Prefixes: damaged files and blends are refused before anything is drawn from them."""

import json
import os
import struct
from pathlib import Path

import pytest

from griffin.trainer.data.prefix import parse_blend, read_blend, read_info
from tests.data_sets import write_prefix


def test_parse_blend():
    assert parse_blend(["a/b"]) == [(None, "a/b")]
    assert parse_blend(["0.3 a", " 7e-1   b c "]) == [(0.3, "a"), (0.7, "b c")]
    assert parse_blend(["a b", "17"]) == [(None, "a b"), (None, "17")]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], 'expected at least one "PREFIX" or "WEIGHT PREFIX"'),
        (["a", " "], "expected at least one"),
        (["0.5 a", "b"], "give every prefix a weight, or none"),
        (["0 a"], "'0 a': the weight must be positive and finite"),
        (["-1 a"], "must be positive"),
        (["nan a"], "must be positive"),
        (["inf a"], "must be positive"),
        (["a", "b", "a"], "a prefix is given twice"),
    ],
)
def test_bad_blends(entries, message):
    with pytest.raises(ValueError, match=message):
        parse_blend(entries)


def test_different_tokenizers(tmp_path):
    a = write_prefix(tmp_path / "a", [[1, 2, 3]])
    b = write_prefix(tmp_path / "b", [[1, 2, 3]], vocabulary=101)
    with pytest.raises(ValueError, match=r"b was built with tokenizer .*101.*need the same"):
        read_blend([a, b])


def patch(path, offset, content):
    data = bytearray(Path(path).read_bytes())
    data[offset : offset + len(content)] = content
    Path(path).write_bytes(data)


def edit(path, **changes):
    record = json.loads(Path(path).read_text()) | changes
    Path(path).write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


# offsets in the index: 9 bytes of magic, 8 of version, 1 of type, 8 + 8 of counts, then int32 lengths
DAMAGE = {
    "no .bin": (lambda p: os.unlink(p + ".bin"), r"p\.bin is missing"),
    "no .idx": (lambda p: os.unlink(p + ".idx"), r"p\.idx is missing"),
    "no .json": (lambda p: os.unlink(p + ".json"), r"p\.json is missing \(build it with"),
    "empty .bin": (lambda p: os.truncate(p + ".bin", 0), r"p\.bin is empty"),
    "empty .idx": (lambda p: os.truncate(p + ".idx", 0), r"p\.idx is empty"),
    "empty .json": (lambda p: os.truncate(p + ".json", 0), r"p\.json is empty"),
    "short .bin": (lambda p: os.truncate(p + ".bin", 399), r"p\.bin is damaged: 399 bytes long instead of 4"),
    "short .idx": (lambda p: os.truncate(p + ".idx", 100), r"p\.idx is damaged: 100 bytes long instead of"),
    "short header": (lambda p: os.truncate(p + ".idx", 20), r"p\.idx is damaged: its header"),
    "long .bin": (lambda p: os.truncate(p + ".bin", 5000), r"p\.bin is damaged: 5000 bytes long instead of 4"),
    "short .json": (lambda p: os.truncate(p + ".json", 50), r"p\.json is damaged: JSONDecodeError"),
    "magic": (lambda p: patch(p + ".idx", 0, b"X"), r"p\.idx is damaged: its header"),
    "version": (lambda p: patch(p + ".idx", 9, b"\2"), r"p\.idx is damaged: its header"),
    "type": (lambda p: patch(p + ".idx", 17, b"\4"), r"p\.idx is damaged: its header"),
    "count": (lambda p: patch(p + ".idx", 18, b"\1\1"), r"p\.idx is damaged: its header"),
    "a length": (lambda p: patch(p + ".idx", 34, struct.pack("<i", 7)), r"p\.idx is damaged: .*lengths and offsets"),
    "a length of 0": (lambda p: patch(p + ".idx", 34, struct.pack("<i", 0)), r"p\.idx is damaged: .*lengths and"),
    "the last length": (
        lambda p: patch(p + ".idx", 34 + 99 * 4, struct.pack("<i", 1)),
        r"p\.idx is damaged: its documents do not add up to",
    ),
    "documents": (lambda p: edit(p + ".json", documents=99), r"p\.idx is damaged: its header does not agree with"),
    "tokens": (lambda p: edit(p + ".json", tokens=1999), r"p\.bin is damaged: \d+ bytes long instead of 3998"),
    "format": (lambda p: edit(p + ".json", format="x"), "p.json is damaged: .*griffin-data-1"),
    "no tokens": (lambda p: edit(p + ".json", tokens=...), r"p\.json is damaged: TypeError"),
    "type of tokens": (lambda p: edit(p + ".json", tokens="many"), r"p\.json is damaged: .*positive integers"),
    "tokenizer": (lambda p: edit(p + ".json", tokenizer={"kind": "bytes"}), r"p\.json is damaged: KeyError"),
    "not a record": (lambda p: Path(p + ".json").write_text("[]"), r"p\.json is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_prefixes(tmp_path, case):
    damage, message = DAMAGE[case]
    prefix = write_prefix(tmp_path / "p", [list(range(1 + i % 9)) + [1] * 19 for i in range(100)])
    read_info(prefix)
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        read_info(prefix)

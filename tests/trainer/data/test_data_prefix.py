"""Prefixes: damaged files and blends are refused before anything is read from them."""

import json
import os
import re
import struct
from pathlib import Path

import pytest

from griffin.tools.cli import main
from griffin.trainer.data import checksums
from griffin.trainer.data import prefix as prefix_module
from griffin.trainer.data.prefix import check_contents, parse_blend, read_blend, read_info, verify
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
        (["a", "./x/../a"], "a prefix is given twice"),
        (["1e308 a", "1e308 b"], "the weights' sum must be finite"),
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
    "the numbers of documents": (
        lambda p: patch(p + ".idx", 34 + 100 * 12 + 8, b"\7"),
        r"p\.idx is damaged: its document numbers",
    ),
    "checksums": (lambda p: edit(p + ".json", checksums={"block_bytes": 0, "bin": "", "idx": ""}), "p.json is damaged"),
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


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 64)
    monkeypatch.setattr(prefix_module, "BLOCK_BYTES", 64)


def flip(path, place):
    content = bytearray(Path(path).read_bytes())
    content[place] ^= 1
    Path(path).write_bytes(content)


def test_every_flipped_bit_is_found_and_named(tmp_path, small_blocks):
    prefix = write_prefix(tmp_path / "p", [[1, 2, 3] * (1 + i % 9) for i in range(12)])
    info = read_info(prefix)
    check_contents(info, whole=True, seed=0)
    assert verify(info) == []
    for suffix in (".bin", ".idx"):
        for place in range(os.path.getsize(prefix + suffix)):
            flip(prefix + suffix, place)
            start = place // 64 * 64
            last = min(start + 64, os.path.getsize(prefix + suffix)) - 1
            problem = f"{prefix}{suffix} is damaged: bytes {start} to {last} are not what was built"
            with pytest.raises(ValueError, match=re.escape(problem)):
                check_contents(info, whole=True, seed=0)
            assert verify(info) == [problem]
            flip(prefix + suffix, place)


def test_zeroed_tokens_are_found(tmp_path, capsys):
    prefix = write_prefix(tmp_path / "p", [[1, 2, 3]] * 40)
    assert main(["data", "verify", prefix]) == 0
    assert capsys.readouterr().out == f"{prefix}.bin: as built\n{prefix}.idx: as built\n"
    Path(prefix + ".bin").write_bytes(bytes(os.path.getsize(prefix + ".bin")))
    assert main(["data", "verify", prefix]) == 2
    assert "p.bin is damaged: bytes 0 to 319 are not what was built" in capsys.readouterr().err


def test_some_blocks_of_a_large_file_are_compared(tmp_path, small_blocks):
    prefix = write_prefix(tmp_path / "p", [[1] * 99] * 200)
    info = read_info(prefix)
    blocks = len(info.checksums.bin) // 8
    assert blocks == 625
    chosen = checksums.sampled(blocks, 7)
    assert chosen == checksums.sampled(blocks, 7) != checksums.sampled(blocks, 8)
    assert len(set(chosen)) == 64
    assert chosen[0] == 0
    assert chosen[-1] == 624
    found = []
    for block in range(blocks):
        flip(prefix + ".bin", block * 64)
        try:
            check_contents(info, whole=False, seed=7)
        except ValueError:
            found.append(block)
        flip(prefix + ".bin", block * 64)
    assert found == chosen


def test_prefix_without_checksums_trains(tmp_path, caplog):
    prefix = write_prefix(tmp_path / "p", [[1, 2, 3]] * 40)
    edit(prefix + ".json", checksums=...)
    info = read_info(prefix)
    check_contents(info, whole=True, seed=0)
    check_contents(info, whole=False, seed=0)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].endswith(f"{prefix}.idx cannot be verified")
    assert messages[1].endswith(f"{prefix}.bin and {prefix}.idx cannot be verified")
    assert verify(info) == []
    flip(prefix + ".bin", 0)
    with pytest.raises(ValueError, match=r"p\.bin is damaged: bytes 0 to 319 are not what was built"):
        check_contents(info, whole=True, seed=0)
    assert len(verify(info)) == 1

"""Safetensors files: the library reads what we write, and damaged headers are detected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from griffin.tools.common import safetensors_files
from griffin.tools.common.safetensors_files import (
    create_file,
    lay_out,
    read_box,
    read_entries,
    require_written,
    write_values,
)
from griffin.trainer.checkpoint.zarr_io import CheckpointError

TENSORS = {
    "a": np.arange(60, dtype=np.float32).reshape(5, 4, 3),
    "b": np.arange(8).astype(ml_dtypes.bfloat16),
    "c": np.zeros((0, 3), np.float16),
    "d": np.array([[1.5]], np.float16),
}


def write(path: Path) -> Path:
    header, entries = lay_out((name, value.dtype.name, value.shape) for name, value in TENSORS.items())
    create_file(path, header, len(header) + sum(entry.nbytes for entry in entries))
    write_values(path, [(entry.offset, TENSORS[entry.name]) for entry in entries])
    return path


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    found = load_file(write(tmp_path / "file"))
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].shape == value.shape
        assert found[name].float().numpy().tolist() == value.astype(np.float32).tolist()


@pytest.mark.parametrize("read_bytes", [1, 100, 2**20])
def test_boxes(tmp_path: Path, read_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "READ_BYTES", read_bytes)
    save_file({name: torch.from_numpy(TENSORS[name]) for name in ("a", "d")}, tmp_path / "file")
    entries = read_entries(tmp_path / "file")
    for box in (
        (slice(0, 5), slice(0, 4), slice(0, 3)),
        (slice(1, 3), slice(2, 4), slice(1, 2)),
        (slice(2, 2), slice(0, 4), slice(0, 3)),
    ):
        assert np.array_equal(read_box(tmp_path / "file", entries["a"], box), TENSORS["a"][box])
    assert read_box(tmp_path / "file", entries["d"], (slice(0, 1), slice(0, 1))) == 1.5


def test_corrupted_writes_are_detected(tmp_path: Path) -> None:
    path = write(tmp_path / "file")
    entry = read_entries(path)["a"]
    require_written(path, entry.offset, TENSORS["a"])
    with pytest.raises(CheckpointError, match="does not hold what was written to it"):
        require_written(path, entry.offset, TENSORS["a"] + 1)


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Return a function that changes the header of a file."""

    def edit(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return edit


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "is 8 bytes too short"),
    "no length": (lambda content: content[:5], "is 3 bytes too short"),
    "huge header": (
        lambda content: b"\xff" * 8 + content[8:],
        "its header has 18,446,744,073,709,551,615 bytes",
    ),
    "no header": (lambda content: bytes(8) + content[8:], "its header has 0 bytes"),
    "cut header": (lambda content: content[:50], "too short"),
    "no JSON": (lambda content: content[:8] + b"x" + content[9:], "its header is not that of a safetensors file"),
    "one byte less": (lambda content: content[:-1], "bytes instead of"),
    "one byte more": (lambda content: content + b"x", "bytes instead of"),
    "list": (lambda content: (2).to_bytes(8, "little") + b"[]", "its header is not that of a safetensors file"),
    "gap": (with_header(lambda header: header["b"].update(data_offsets=[241, 257])), "b begins at byte"),
    "overlap": (with_header(lambda header: header["b"].update(data_offsets=[0, 16])), "begins at byte"),
    "negative": (with_header(lambda header: header["b"].update(data_offsets=[-16, 0])), "its header is not that of"),
    "shape": (with_header(lambda header: header["b"].update(shape=[9])), "b has 16 bytes instead of 18 for its shape"),
    "fraction": (
        with_header(lambda header: header["b"].update(shape=[8.0])),
        "its header is not that of a safetensors file",
    ),
    "no offsets": (with_header(lambda header: header["b"].pop("data_offsets")), "its header is not that of"),
    "dtype": (with_header(lambda header: header["b"].update(dtype="I16")), "b is of dtype I16; must be F32, F16, BF16"),
    "missing tensor": (with_header(lambda header: header.pop("a")), "b begins at byte"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "file")
    change, message = DAMAGED[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError) as error:
        read_entries(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: No such file or directory"):
        read_entries(tmp_path / "absent")

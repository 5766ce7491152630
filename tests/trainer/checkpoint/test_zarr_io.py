"""Arrays of a checkpoint: bitwise round trips, readable by stock zarr, and no silent loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import zarr

from griffin.trainer.checkpoint.arrays import ArraySpec, GlobalTensor, numpy_dtype
from griffin.trainer.checkpoint.zarr_io import CheckpointError, create_array, open_array
from tests.small_steps import ARRAYS, bits, random_bits, write_array

WIDE = ArraySpec(kind="model", tensor=GlobalTensor(name="wide", shape=(8, 16384)), dtype="float32", chunks=(4, 16384))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "chunks"), [((1,), (1,)), ((9,), (4,)), ((4, 6), (2, 6)), ((5, 7), (2, 4)), ((3, 5, 2), (2, 2, 2))]
)
def test_round_trip(tmp_path, shape, chunks, dtype):
    spec = ArraySpec(kind="model", tensor=GlobalTensor(name="x.y", shape=shape), dtype=dtype, chunks=chunks)
    values = random_bits(spec)
    files = write_array(tmp_path, spec, values)

    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*map(spec.file, spec.indices()), spec.metadata_file}
    assert files.keys() == found - {spec.metadata_file}
    array = open_array(tmp_path, spec)
    for box in [tuple(slice(0, size) for size in shape), *map(spec.box, spec.indices())]:
        read = array.read(box)
        assert read.dtype == numpy_dtype(dtype)
        np.testing.assert_array_equal(bits(read), bits(values[box]))
    inner = tuple(slice(size // 3, size) for size in shape)  # across chunks
    np.testing.assert_array_equal(bits(array.read(inner)), bits(values[inner]))

    stock = zarr.open_array(tmp_path / spec.name, mode="r")
    assert stock.chunks == chunks
    assert stock.attrs["dtype"] == dtype
    content = np.asarray(stock[:])
    if dtype == "bfloat16":
        content = content.view(ml_dtypes.bfloat16)
    assert content.dtype == numpy_dtype(dtype)
    np.testing.assert_array_equal(bits(content), bits(values))


def test_every_bfloat16(tmp_path):
    spec = ArraySpec(kind="model", tensor=GlobalTensor(name="all", shape=(65536,)), dtype="bfloat16", chunks=(40000,))
    patterns = np.arange(65536, dtype=np.uint16)
    write_array(tmp_path, spec, patterns.view(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(open_array(tmp_path, spec).read((slice(0, 65536),)).view(np.uint16), patterns)
    np.testing.assert_array_equal(np.asarray(zarr.open_array(tmp_path / spec.name, mode="r")[:]), patterns)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_are_written(tmp_path, dtype):
    """So that zero moments, as before Adam's first step, differ from lost chunks."""
    spec = replace(ARRAYS[0], dtype=dtype)
    files = write_array(tmp_path, spec, np.zeros(spec.shape, numpy_dtype(dtype)))
    for file, record in files.items():
        assert (tmp_path / file).stat().st_size == record.size == 8 * numpy_dtype(dtype).itemsize + 4
    array = open_array(tmp_path, spec)
    assert not np.any(bits(array.read((slice(0, 5), slice(0, 7)))))
    (tmp_path / spec.file((1, 1))).unlink()
    with pytest.raises(CheckpointError, match=r"c\.1\.1"):
        array.read((slice(0, 5), slice(0, 7)))


def test_records_match_the_files(tmp_path):
    for file, record in write_array(tmp_path, ARRAYS[0], random_bits(ARRAYS[0])).items():
        content = (tmp_path / file).read_bytes()
        assert record.size == len(content)
        assert record.checksum == f"crc32c:{google_crc32c.value(content[:-4]):08x}"


def test_values_may_change_once_written(tmp_path):
    """Neither a write nor the array keeps a reference to the values."""
    array = create_array(tmp_path, WIDE)
    values = np.ones((4, 16384), np.float32)
    array.write((0, 0), values).result()
    values[:] = 2
    assert np.all(array.read(WIDE.box((0, 0))) == 1)


def test_chunks_are_written_whole(tmp_path):
    array = create_array(tmp_path, ARRAYS[0])
    with pytest.raises(AssertionError):
        array.write((0, 0), np.zeros((1, 4), ml_dtypes.bfloat16))
    with pytest.raises(AssertionError):
        array.write((0, 0), np.zeros((2, 4), np.float32))


def test_several_processes_create_an_array(tmp_path):
    """Any process that writes chunks of an array may create it."""
    spec = ArraySpec(kind="model", tensor=GlobalTensor(name="x", shape=(40,)), dtype="float32", chunks=(1,))
    program = f"""
import sys
from pathlib import Path
import numpy as np
from griffin.trainer.checkpoint.arrays import ArraySpec, GlobalTensor
from griffin.trainer.checkpoint.zarr_io import create_array
spec = {spec!r}
print("ready", flush=True)
worker = int(sys.stdin.readline())
for step in range(10):
    folder = Path(sys.argv[1], str(step))
    folder.mkdir(exist_ok=True)
    array = create_array(folder, spec)
    for index in range(worker, 40, 4):
        array.write((index,), np.array([index], np.float32)).result()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for worker, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(f"{worker}\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0] * 4
    for step in range(10):
        folder = tmp_path / str(step)
        np.testing.assert_array_equal(open_array(folder, spec).read((slice(0, 40),)), np.arange(40))
        assert len(list((folder / spec.name).iterdir())) == 41


TENSOR = ARRAYS[0].tensor


@pytest.mark.parametrize(
    "other",
    [
        replace(ARRAYS[0], tensor=replace(TENSOR, shape=(5, 8))),
        replace(ARRAYS[0], tensor=replace(TENSOR, shape=(5, 7, 1)), chunks=(2, 4, 1)),
        replace(ARRAYS[0], tensor=replace(TENSOR, axis=0)),
        replace(ARRAYS[0], tensor=replace(TENSOR, atoms=1)),
        replace(ARRAYS[0], tensor=replace(TENSOR, padded=14)),
        replace(ARRAYS[0], dtype="float16"),
        replace(ARRAYS[0], chunks=(2, 7)),
    ],
)
def test_other_metadata_is_refused(tmp_path, other):
    write_array(tmp_path, ARRAYS[0], random_bits(ARRAYS[0]))
    before = (tmp_path / other.metadata_file).read_bytes()
    for use in (open_array, create_array):
        with pytest.raises(CheckpointError) as error:
            use(tmp_path, other)
        assert str(tmp_path / other.metadata_file) in str(error.value)
    assert (tmp_path / other.metadata_file).read_bytes() == before


def test_missing_or_broken_metadata_is_refused(tmp_path):
    path = tmp_path / ARRAYS[0].metadata_file
    for content in (None, b"", b"{", b"{}", b"[1]"):
        if content is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            open_array(tmp_path, ARRAYS[0])
        assert str(path) in str(error.value)


def test_metadata_has_what_readers_need(tmp_path):
    create_array(tmp_path, ARRAYS[3])
    metadata = json.loads((tmp_path / ARRAYS[3].metadata_file).read_text())
    assert metadata["attributes"] == {"dtype": "float16", "axis": 0, "atoms": 3, "padded": 12}
    assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "crc32c"]


def test_a_folder_in_place_of_a_chunk(tmp_path):
    array = create_array(tmp_path, WIDE)
    (tmp_path / WIDE.file((0, 0))).mkdir()
    with pytest.raises(CheckpointError, match=r"c\.0\.0.*File exists"):
        array.write((0, 0), np.ones((4, 16384), np.float32))


def test_a_chunk_is_not_written_twice(tmp_path):
    write_array(tmp_path, WIDE, np.ones((8, 16384), np.float32))
    array = open_array(tmp_path, WIDE)
    with pytest.raises(CheckpointError, match=r"c\.1\.0.*File exists"):
        array.write((1, 0), np.zeros((4, 16384), np.float32))
    assert np.all(array.read((slice(0, 8), slice(0, 16384))) == 1)


def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(CheckpointError) as error:
            create_array(tmp_path, WIDE)
    finally:
        tmp_path.chmod(0o700)
    assert WIDE.name in str(error.value)
    assert "Permission denied" in str(error.value)


def test_a_partial_write_leaves_no_chunk(tmp_path):
    """A file size limit stands in for a full disk: both fail in the middle of a write."""
    program = f"""
import resource, sys
from pathlib import Path
import numpy as np
from griffin.trainer.checkpoint.arrays import ArraySpec, GlobalTensor
from griffin.trainer.checkpoint.zarr_io import CheckpointError, create_array
array = create_array(Path(sys.argv[1]), {WIDE!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    array.write((0, 0), np.ones((4, 16384), np.float32))
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
array.write((1, 0), np.ones((4, 16384), np.float32)).result()
"""
    process = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert str(tmp_path / WIDE.file((0, 0))) in process.stdout
    assert "File too large" in process.stdout
    assert sorted(os.listdir(tmp_path / WIDE.name)) == ["c.1.0", "zarr.json"]


def test_a_folder_that_vanished(tmp_path):
    write_array(tmp_path, WIDE, random_bits(WIDE))
    array = open_array(tmp_path, WIDE)
    (tmp_path / WIDE.name).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError) as error:
        array.read(WIDE.box((1, 0)))
    assert str(Path(tmp_path, WIDE.file((1, 0)))) in str(error.value)

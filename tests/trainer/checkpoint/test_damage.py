"""Every kind of damage to a step is found, and the file is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from griffin.trainer.checkpoint.manifest import check, read_manifest, verify
from griffin.trainer.checkpoint.steps import newest_complete, resolve
from griffin.trainer.checkpoint.zarr_io import CheckpointError, open_array
from tests.small_steps import ARRAYS, save_step

CHUNK = ARRAYS[0].file((1, 1))
METADATA = ARRAYS[0].metadata_file


def read(folder: Path) -> None:
    """Read all arrays, as loading does after `check`."""
    for spec in ARRAYS:
        array = open_array(folder, spec)
        for index in spec.indices():
            array.read(spec.box(index))


def flip(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def edit(old: str, new: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return apply


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0" * 4)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_another_chunk(path: Path) -> None:
    shutil.copy(path.with_name("c.0.0"), path)


ALL = (check, read, verify)
READERS = (read, verify)
MANIFEST_READERS = (read_manifest, check, verify)
DAMAGE: dict[str, tuple[str, Callable[[Path], object], tuple[Callable, ...]]] = {
    "chunk missing": (CHUNK, Path.unlink, ALL),
    "chunk truncated": (CHUNK, lambda path: os.truncate(path, path.stat().st_size - 1), ALL),
    "chunk truncated to its checksum": (CHUNK, lambda path: os.truncate(path, 4), ALL),
    "chunk of zero bytes": (CHUNK, lambda path: os.truncate(path, 0), ALL),
    "chunk with bytes appended": (CHUNK, append, (check, verify)),
    "chunk a folder": (CHUNK, replace_by_a_folder, ALL),
    "chunk with a bit of data flipped": (CHUNK, lambda path: flip(path, 5), READERS),
    "chunk with a bit of its checksum flipped": (CHUNK, lambda path: flip(path, -1), READERS),
    "chunk all zeros": (CHUNK, lambda path: path.write_bytes(bytes(path.stat().st_size)), READERS),
    "chunk of another place": (CHUNK, replace_by_another_chunk, (verify,)),
    "array missing": (METADATA, lambda path: shutil.rmtree(path.parent), ALL),
    "array's metadata missing": (METADATA, Path.unlink, ALL),
    "array's metadata truncated": (METADATA, lambda path: os.truncate(path, 0), ALL),
    "array's shape edited": (METADATA, edit('"shape":[5,7]', '"shape":[5,6]'), READERS),
    "array's dtype edited": (METADATA, edit('"dtype":"bfloat16"', '"dtype":"bfloat32"'), READERS),
    "array's separator edited": (METADATA, edit('"separator":"."', '"separator":"/"'), READERS),
    "array's checksums switched off": (METADATA, edit(',{"name":"crc32c"}', ""), ALL),
    "array's metadata reordered": (METADATA, edit('"atoms":7,"axis":1', '"axis":1,"atoms":7'), (verify,)),
    "group's metadata missing": ("zarr.json", Path.unlink, (check, verify)),
    "group's metadata edited": ("zarr.json", edit('"step": 1', '"step": 2'), (check, verify)),
    "manifest missing": ("manifest.json", Path.unlink, MANIFEST_READERS),
    "manifest of zero bytes": ("manifest.json", lambda path: os.truncate(path, 0), MANIFEST_READERS),
    "manifest truncated": ("manifest.json", lambda path: os.truncate(path, 900), MANIFEST_READERS),
    "manifest not an object": ("manifest.json", lambda path: path.write_text("[]"), MANIFEST_READERS),
    "manifest not text": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\0"), MANIFEST_READERS),
    "manifest: a size edited": ("manifest.json", edit('{"size": 20,', '{"size": 24,'), MANIFEST_READERS),
    "manifest: the step edited": ("manifest.json", edit('"step": 1,', '"step": 2,'), MANIFEST_READERS),
    "manifest: the config edited": ("manifest.json", edit('"width": 4096', '"width": 2048'), MANIFEST_READERS),
    "manifest: an array removed": ("manifest.json", edit('"model.up": {', '"model.down": {'), MANIFEST_READERS),
    "manifest: checksum removed": ("manifest.json", edit('"checksum"', '"sum"'), MANIFEST_READERS),
    "manifest: format edited": ("manifest.json", edit('"format": 1', '"format": 9'), MANIFEST_READERS),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run with two intact steps; tests change copies of it."""
    run = tmp_path_factory.mktemp("run")
    for step in (0, 1):
        folder = save_step(run / "checkpoints", step)
        for use in (check, read, verify):
            use(folder)
    return run


@pytest.fixture
def run(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "run")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(run, kind):
    file, harm, finders = DAMAGE[kind]
    folder = run / "checkpoints" / "step-00000001"
    harm(folder / file)
    for find in finders:
        with pytest.raises(CheckpointError) as error:
            find(folder)
        assert str(folder / file) in str(error.value), (find, error.value)
    if check in finders:  # a resume falls back to the step before, and says why
        found, damaged = newest_complete(run / "checkpoints")
        assert found == resolve(run) == run / "checkpoints" / "step-00000000"
        assert len(damaged) == 1
        assert str(folder / file) in str(damaged[0])


def test_a_flipped_bit_in_any_file_is_found(run):
    folder = run / "checkpoints" / "step-00000001"
    random = np.random.default_rng(0)
    for file in check(folder).files:
        path = folder / file
        content = path.read_bytes()
        flip(path, int(random.integers(len(content))), int(random.integers(8)))
        with pytest.raises(CheckpointError) as error:
            verify(folder)
        assert str(path) in str(error.value)
        path.write_bytes(content)
    verify(folder)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(run):
    folder = run / "checkpoints" / "step-00000001"
    path = folder / "manifest.json"
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for byte in random.choice(len(content), 400, replace=False):
        flip(path, byte, int(random.integers(8)))
        with pytest.raises(CheckpointError) as error:
            read_manifest(folder)
        assert str(path) in str(error.value)
        path.write_bytes(content)
    read_manifest(folder)


def test_all_damaged_files_are_named(run):
    folder = run / "checkpoints" / "step-00000001"
    chunks = [ARRAYS[1].file((0, 0)), ARRAYS[2].file((1, 0, 0)), ARRAYS[3].file((2,))]
    for file in chunks:
        flip(folder / file, 0)
    edit('"axis":1', '"axis":0')(folder / METADATA)
    with pytest.raises(CheckpointError) as error:
        verify(folder)
    for file in (*chunks, METADATA):
        assert str(error.value).count(str(folder / file)) == 1


def test_a_long_list_of_damaged_files_is_cut(run):
    folder = run / "checkpoints" / "step-00000001"
    count = 0
    for spec in ARRAYS:
        for index in spec.indices():
            (folder / spec.file(index)).unlink()
            count += 1
    with pytest.raises(CheckpointError) as error:
        check(folder)
    assert str(error.value).endswith(f"\nand {count - 10} more")
    assert str(error.value).count(" is missing") == 10

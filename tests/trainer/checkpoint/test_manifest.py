"""Steps are committed atomically, found, resolved, retained and cleaned."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr

from griffin.trainer.checkpoint import manifest as manifests
from griffin.trainer.checkpoint.header import header_to_json
from griffin.trainer.checkpoint.manifest import begin, check, commit, read_manifest, step_name, verify
from griffin.trainer.checkpoint.steps import clean, newest_complete, resolve, retain, steps
from griffin.trainer.checkpoint.zarr_io import CheckpointError, FileRecord
from tests.small_steps import ARRAYS, bits, random_bits, save_step, write_step

FEW = ARRAYS[3:]  # for tests of folders, whatever they hold


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def damage(folder: Path) -> None:
    """Remove a chunk, which is noticed without reading arrays."""
    (folder / FEW[0].file((0,))).unlink()


# Committing.


@pytest.mark.filterwarnings("ignore:Object at manifest.json")  # when the group is listed
def test_a_step_is_a_zarr_group(root):
    folder = save_step(root, 100)
    assert folder == root / "step-00000100"
    assert names(root) == ["step-00000100"]
    group = zarr.open_group(folder, mode="r")
    assert dict(group.attrs) == {"step": 100, "format": 1}
    for spec in ARRAYS:
        stock = group[spec.name]
        assert isinstance(stock, zarr.Array)
        content = np.asarray(stock[:])
        if spec.dtype == "bfloat16":
            content = content.view(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(bits(content), bits(random_bits(spec)))
    assert set(group.array_keys()) == {spec.name for spec in ARRAYS}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": None, "random": {}},
        {"extras": {"ramp": {"sizes": [8, 16], "ends": None}, "evaluation": 0.5}},
        {"config": {'é\n"': [1e-05, 0.1, 1e300, -0.0, float("inf"), None, True, {"b": {}, "a": []}]}},
    ],
)
def test_a_manifest_is_read_as_it_was_written(root, changes):
    tmp, manifest = write_step(root, 100, **changes)
    folder = commit(tmp, manifest)
    found = read_manifest(folder)
    assert replace(found, files=manifest.files) == manifest
    assert found.files.keys() - manifest.files.keys() == {"zarr.json", *(spec.metadata_file for spec in ARRAYS)}
    assert manifest.files.items() <= found.files.items()
    assert check(folder) == verify(folder) == found
    for path, record in found.files.items():
        assert record.size == (folder / path).stat().st_size


def test_a_manifest_has_a_line_for_each_file(root):
    folder = save_step(root, 100)
    lines = (folder / "manifest.json").read_text().splitlines()
    for path in check(folder).files:
        assert sum(line.startswith(f'    "{path}": ') for line in lines) == 1
    assert '  "step": 100,' in lines
    assert json.loads((folder / "manifest.json").read_text())["format"] == 1


def test_a_step_without_arrays(root):
    """It has a group and a manifest only."""
    verify(save_step(root, 0, arrays=()))


def test_every_file_has_one_record(root):
    tmp, manifest = write_step(root, 100)
    file = ARRAYS[0].file((1, 1))
    fewer = {path: record for path, record in manifest.files.items() if path != file}
    for files in (fewer, manifest.files | {"model.up/c.9.9": FileRecord(4, "crc32c:00000000")}):
        with pytest.raises(AssertionError, match=r"model\.up/c\."):
            commit(tmp, replace(manifest, files=files))
    assert names(root) == ["step-00000100.tmp"]


@pytest.mark.parametrize("harm", ["chunk missing", "chunk too short", "metadata missing", "metadata of another array"])
def test_commit_refuses_missing_and_wrong_files(root, harm):
    tmp, manifest = write_step(root, 100)
    path = tmp / (ARRAYS[0].file((1, 1)) if "chunk" in harm else ARRAYS[0].metadata_file)
    if "missing" in harm:
        path.unlink()
    elif "short" in harm:
        os.truncate(path, 3)
    else:
        shutil.copy(tmp / ARRAYS[1].metadata_file, path)
    with pytest.raises(CheckpointError) as error:
        commit(tmp, manifest)
    assert str(path) in str(error.value)
    assert names(root) == ["step-00000100.tmp"]


def test_commit_is_durable(root, monkeypatch):
    """All files are synchronised before the rename, and the rename is before commit returns."""
    tmp, manifest = write_step(root, 100)
    events = []  # folders and files that were synchronised, and renames
    fsync, rename = os.fsync, Path.rename

    def spy_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def spy_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    commit(tmp, manifest)
    at = events.index("rename")
    assert events.count("rename") == 1
    written = [str(tmp / name) for name in ("zarr.json", "manifest.json")]
    assert sorted(events[: at - 1]) == sorted(written)
    assert events[at - 1] == str(tmp)
    assert events[at + 1 :] == [str(root)]


def test_commit_keeps_a_folder_that_has_the_name(root):
    """A damaged step that the run reaches again."""
    for attempt in (1, 2, 3):
        save_step(root, 100, arrays=FEW, attempt=attempt)
    assert names(root) == ["step-00000100", "step-00000100.damaged-1", "step-00000100.damaged-2"]
    found = [read_manifest(root / name).attempt for name in names(root)]
    assert found == [3, 1, 2]
    assert [step for step, _ in steps(root)] == [100]


def test_begin_replaces_a_leftover(root):
    tmp, _ = write_step(root, 100)
    assert begin(root, 100) == tmp == root / "step-00000100.tmp"
    assert names(tmp) == []


def test_begin_does_not_create_a_run_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone.*No such file"):
        begin(tmp_path / "gone" / "checkpoints", 1)


def test_begin_where_the_checkpoints_folder_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"step-00000001\.tmp: Not a directory"):
        begin(tmp_path / "checkpoints", 1)


def test_another_format_is_refused(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "FORMAT", 2)
        folder = save_step(root, 1, arrays=FEW)
    with pytest.raises(CheckpointError, match=r"manifest\.json is of format 2; .* reads format 1"):
        check(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("samples", 1.5),
        ("attempt", True),
        ("created", None),
        ("config", []),
        ("layout", {"tensor": 0}),
        ("optimizer", "adam"),
        ("random", {"cpu": 1}),
        ("spikes", {"losses": ["1"]}),
        ("sources", "a"),
        ("extras", [1]),
    ],
)
def test_a_header_of_other_types_is_refused(root, key, value):
    tmp, manifest = write_step(root, 2, arrays=FEW)
    folder = commit(tmp, replace(manifest, **{key: value}), root / step_name(2))
    with pytest.raises(
        CheckpointError, match=rf"step-00000002/manifest\.json is damaged, .*: {key}(\.\w+)? = .*must be"
    ):
        check(folder)


def test_other_keys_are_refused(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "header_to_json", lambda manifest: header_to_json(manifest) | {"ramp": 1})
        folder = save_step(root, 1, arrays=FEW)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged, .*: has the unknown key 'ramp'"):
        check(folder)


def test_other_files_are_ignored(root):
    folder = save_step(root, 1)
    (folder / "notes.txt").write_text("mine")
    (folder / ARRAYS[0].name / "c.0.0.orig").write_text("")
    check(folder)
    verify(folder)


def test_verify_reports_progress(root):
    folder = save_step(root, 1)
    parts = []
    manifest = verify(folder, parts.append, workers=3)
    assert sum(parts) == sum(record.size for record in manifest.files.values())
    assert len(parts) == len(manifest.files)


# Finding.


def test_steps_are_found_by_their_names(root):
    assert steps(root) == []
    for step in (20, 123456789, 3):
        save_step(root, step, arrays=FEW)
    for name in ("step-00000004.tmp", "step-00000005.deleted", "step-00000006.damaged-1", "step-7", "final", "logs"):
        (root / name).mkdir()
    assert steps(root) == [(step, root / step_name(step)) for step in (3, 20, 123456789)]
    assert (root / "step-123456789").exists()


def test_newest_complete(root):
    assert newest_complete(root) == (None, [])
    folders = [save_step(root, step, arrays=FEW) for step in (1, 2, 3, 4)]
    begin(root, 5)
    assert newest_complete(root) == (folders[3], [])
    assert newest_complete(root, before=4) == (folders[2], [])
    assert newest_complete(root, before=1) == (None, [])
    damage(folders[3])
    (folders[2] / "manifest.json").unlink()
    damage(folders[0])
    found, damaged = newest_complete(root)
    assert found == folders[1]
    assert [re.search(r"step-\d+/\S+", str(error))[0] for error in damaged] == [  # type: ignore[index]
        "step-00000004/optimizer.exp_avg_sq.bias/c.0",
        "step-00000003/manifest.json:",
    ]
    damage(folders[1])
    found, damaged = newest_complete(root)
    assert found is None
    assert len(damaged) == 4


def test_resolve(tmp_path, root):
    first, second, third = (save_step(root, step, arrays=FEW) for step in (1, 2, 3))
    damage(third)
    assert resolve(root) == resolve(tmp_path) == second
    for folder in (first, second, third):
        assert resolve(folder) == folder
    elsewhere = first.rename(tmp_path / "exported")
    assert resolve(elsewhere) == elsewhere


def test_resolve_names_what_it_looked_for(tmp_path, root):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no manifest\.json, no step-\* and no checkpoints/step-\*"):
        resolve(tmp_path)
    damage(save_step(root, 1, arrays=FEW))
    for path in (root, tmp_path):
        with pytest.raises(CheckpointError, match=r"no complete checkpoint:\n.*step-00000001.*bias/c\.0 is missing"):
            resolve(path)


# Retaining.


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (0, 0, [1, 2, 3, 4, 5, 6]),
        (0, 2, [1, 2, 3, 4, 5, 6]),
        (1, 0, [6]),
        (2, 0, [5, 6]),
        (2, 3, [3, 5, 6]),
        (1, 1, [1, 2, 3, 4, 5, 6]),
        (9, 0, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_retain(root, keep_last, keep_every, kept):
    for step in range(1, 7):
        save_step(root, step, arrays=FEW)
    removed = retain(root, keep_last, keep_every, 6)
    assert names(root) == [step_name(step) for step in kept]
    assert sorted(removed) == [root / step_name(step) for step in range(1, 7) if step not in kept]


def test_retain_removes_nothing_unless_the_newest_is_complete(root):
    for step in (1, 2, 3):
        save_step(root, step, arrays=FEW)
    damage(root / step_name(3))
    assert retain(root, 1, 0, 3) == []
    assert len(steps(root)) == 3


def test_retain_does_not_count_damaged_steps(root):
    for step in range(1, 6):
        save_step(root, step, arrays=FEW)
    damage(root / step_name(4))
    assert [path.name for path in retain(root, 2, 0, 5)] == [step_name(2), step_name(1)]
    assert [step for step, _ in steps(root)] == [3, 4, 5]


def test_retain_leaves_later_steps_and_those_of_weights_only(root):
    for step in (1, 2, 3, 5):
        save_step(root, step, arrays=FEW)
    save_step(root, 4, arrays=FEW, optimizer=None)
    assert retain(root, 1, 0, 4) == []  # weights only: nothing else may stand in its place
    assert [path.name for path in retain(root, 2, 0, 3)] == [step_name(1)]
    assert [step for step, _ in steps(root)] == [2, 3, 4, 5]
    assert [path.name for path in retain(root, 2, 0, 5)] == [step_name(2)]
    assert [step for step, _ in steps(root)] == [3, 4, 5]


def test_two_owners_write_a_step_in_different_folders(root):
    one, other = begin(root, 7, "aaaa0000"), begin(root, 7, "bbbb0000")
    assert names(root) == ["step-00000007.aaaa0000.tmp", "step-00000007.bbbb0000.tmp"]
    assert begin(root, 7, "aaaa0000") == one
    assert steps(root) == []
    assert sorted(clean(root)) == [one, other]


def test_clean_passes_over_what_cannot_be_removed(root, monkeypatch):
    save_step(root, 1, arrays=FEW)
    (root / "step-00000002.tmp").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
        assert clean(root) == []
    assert clean(root) == [root / "step-00000002.tmp"]


def test_an_interrupted_removal_leaves_no_step(root, monkeypatch):
    for step in (1, 2):
        save_step(root, step, arrays=FEW)

    def die(folder: Path) -> None:
        damage(folder)
        raise OSError(5, "Input/output error", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(CheckpointError, match=r"step-00000001\.deleted: Input/output error"):
            retain(root, 1, 0, 2)
    assert [step for step, _ in steps(root)] == [2]
    assert clean(root) == [root / "step-00000001.deleted"]
    assert names(root) == ["step-00000002"]


def test_a_step_removed_twice(root):
    """The run reached it again after its first removal was interrupted."""
    for step in (1, 2):
        save_step(root, step, arrays=FEW)
    (root / "step-00000001.deleted" / "model.x").mkdir(parents=True)
    assert retain(root, 1, 0, 2) == [root / step_name(1)]
    assert names(root) == [step_name(2)]


def test_clean_removes_leftovers_only(root):
    assert clean(root) == []
    save_step(root, 1, arrays=FEW)
    write_step(root, 2, arrays=FEW)
    others = ["mine.tmp", "old.deleted", "step-00000003.damaged-1", "step-1.tmp"]
    for name in [*others, "step-00000004.deleted"]:
        (root / name).mkdir()
    assert sorted(path.name for path in clean(root)) == ["step-00000002.tmp", "step-00000004.deleted"]
    assert names(root) == sorted([*others, step_name(1)])

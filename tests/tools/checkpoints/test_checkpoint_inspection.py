from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from griffin.parallel.config import ParallelConfig
from griffin.tools.checkpoints import inspection
from griffin.tools.cli import main
from griffin.trainer.checkpoint.arrays import GlobalTensor
from griffin.trainer.checkpoint.manifest import Manifest, commit, read_manifest
from tests.checkpoints import TENSORS, config_json, make_checkpoint, small_chunks

FEW = [TENSORS[0], GlobalTensor(name="blocks.0.mlp.down.weight", shape=(8, 24), axis=1, atoms=24), TENSORS[-1]]


@pytest.fixture(autouse=True, scope="module")
def chunks() -> Iterator[None]:
    with small_chunks(2048):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for step in (100, 200):
        make_checkpoint(folder / f"run/checkpoints/step-{step:08d}", step=step, tensors=FEW, seed=step)
    return folder / "run"


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A run folder with steps 100 and 200."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flip(path: Path, at: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("given", ["", "checkpoints"])
def test_list_shows_every_step(run: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run / given)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in (run / "checkpoints/step-00000100").rglob("*") if path.is_file())
    size -= (run / "checkpoints/step-00000100/manifest.json").stat().st_size
    words = f"{size:,} bytes  2026-01-02T03:04:05  attempt 2    tensor 1, pipeline 1 x 1, data 1  complete"
    assert first.split("  ", 1)[0] == str(run / "checkpoints/step-00000100")
    assert first.endswith(words)
    assert second.startswith(str(run / "checkpoints/step-00000200"))


def test_list_says_why_a_step_is_incomplete(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = run / "checkpoints/step-00000100/model.final_norm.weight/c.0"
    lost.unlink()
    (run / "checkpoints/step-00000200/manifest.json").unlink()
    assert main(["checkpoint", "list", str(run / "checkpoints/step-00000100"), str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0] == lines[1]
    assert lines[0].endswith(f"tensor 1, pipeline 1 x 1, data 1  incomplete: {lost} is missing")
    assert "incomplete: " in lines[2]
    assert str(run / "checkpoints/step-00000200/manifest.json") in lines[2]


def test_list_of_a_layout_that_is_not_recorded_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A layout is for information only: another writer's need not name every axis."""
    make_checkpoint(tmp_path / "a", tensors=FEW)
    write_step(tmp_path / "b", replace(read_manifest(tmp_path / "a"), layout={"tensor": 2}, files={}), tmp_path / "a")
    assert main(["checkpoint", "list", str(tmp_path / "b")]) == 0
    assert "tensor 2, pipeline 1 x 1, data 1  complete" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["list", "inspect", "verify"])
def test_folder_without_checkpoint(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", command, str(tmp_path)]) == 2
    assert f"griffin: error: {tmp_path} is no checkpoint" in capsys.readouterr().err


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == [
        f"path       {run}/checkpoints/step-00000200",
        "step       200",
        "samples    800",
        "attempt    2",
        "created    2026-01-02T03:04:05+0000",
        "layout     tensor 1, pipeline 1, virtual_pipeline 1, sequence_parallel False, data 1",
        "optimizer  name adamw, step 200",
    ]
    assert lines[lines.index("[model]") + 1] == 'pattern = ["recurrent", "attention", "recurrent", "attention"]'
    table = lines[next(place for place, line in enumerate(lines) if line.startswith("array ")) + 1 : -2]
    assert [line.split("  ")[0].strip() for line in table] == [
        f"{kind}.{tensor.name}" for tensor in FEW for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    ]
    assert table[0].split(None, 1)[1].split("  ") == ["[130, 8]", "float32", "4,160", "5 x [32, 8]"]
    parameters = 130 * 8 + 8 * 24 + 8
    assert (
        lines[-1] == f"9 arrays, {parameters:,} parameters, {12 * parameters:,} bytes, {9 + 1 + 3 * (5 + 8 + 1)} files"
    )


def test_inspect_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints/step-00000100"
    assert main(["checkpoint", "inspect", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    manifest = read_manifest(folder)
    for name in ("step", "samples", "attempt", "created", "config", "layout", "optimizer"):
        assert shown[name] == getattr(manifest, name)
    assert shown["arrays"]["model.blocks.0.mlp.down.weight"] == {
        "dtype": "float32",
        "shape": [8, 24],
        "chunks": [8, 3],
        "axis": 1,
        "atoms": 24,
        "padded": None,
        "bytes": 768,
        "files": 8,
    }
    assert shown["totals"]["files"] == len(manifest.files)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inspect_array(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Statistics of an array of several chunks, read a few rows at a time, equal numpy's."""
    monkeypatch.setattr(inspection, "READ_ELEMENTS", 64 * 8)
    monkeypatch.setattr(inspection, "COUNTED_ELEMENTS", 100)
    values = make_checkpoint(tmp_path / "step", tensors=FEW, dtype=dtype)["model.embedding.weight"].astype(np.float64)
    assert main(["checkpoint", "inspect", str(tmp_path / "step"), "--array", "model.embedding.weight"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "array       model.embedding.weight",
        f"step        {tmp_path / 'step'}",
        f"shape       [130, 8], {dtype}, {130 * 8 * (4 if dtype == 'float32' else 2):,} bytes",
        "chunks      5 x [32, 8]",
        "sharded     along axis 0, padded to 256 in memory",
    ]
    statistics = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    assert lines[5:11] == [
        *(f"{name:<11} {value:.6g}" for name, value in statistics.items()),
        f"zeros       {(values == 0).sum()}",
        "non_finite  0",
    ]
    rows = [line.strip("[] ").split() for line in lines[11:]]
    assert rows.pop(3) == ["..."]
    corner = np.array([[float(word) for word in row if word != "..."] for row in rows])
    assert np.allclose(corner, values[np.ix_([0, 1, 2, -3, -2, -1], [0, 1, 2, -3, -2, -1])], atol=1e-5)
    assert main(["checkpoint", "inspect", str(tmp_path / "step"), "--array", "model.final_norm.weight", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["array"], shown["shape"], shown["axis"]) == ("model.final_norm.weight", [8], None)
    assert shown["statistics"].keys() == {*statistics, "zeros", "non_finite"}


def test_statistics_of_values_that_are_not_finite() -> None:
    from griffin.tools.checkpoints.inspection import statistics_of

    blocks = [np.array([np.nan, 1e8]), np.array([np.inf]), np.array([0, 1e8 + 2, -np.inf])]
    finite = np.array([1e8, 0, 1e8 + 2])
    found = statistics_of(block.astype(np.float64) for block in blocks)
    assert (found["min"], found["max"], found["zeros"], found["non_finite"]) == (0, 1e8 + 2, 1, 3)
    assert (found["mean"], found["std"]) == pytest.approx((finite.mean(), finite.std()), rel=1e-14)
    assert statistics_of([np.full(3, np.nan)]) == {"zeros": 0, "non_finite": 3}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda array: flip(array / "c.1.0"), "checksum"),
        (lambda array: (array / "c.1.0").unlink(), "c.1.0 is missing"),  # which Zarr takes for zeros
        (lambda array: flip(array / "zarr.json", 2), "zarr.json"),
    ],
    ids=["chunk", "missing", "metadata"],
)
def test_inspect_refuses_a_damaged_array(run: Path, damage, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    array = run / "checkpoints/step-00000200/model.embedding.weight"
    damage(array)
    assert main(["checkpoint", "inspect", str(array.parent), "--array", array.name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(array) in error
    assert message in error


def test_inspect_names_an_array_that_there_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(run), "--array", "embedding.weight"]) == 2
    step = run / "checkpoints/step-00000200"
    assert capsys.readouterr().err == (
        f"griffin: error: --array embedding.weight: must be an array of {step}, such as model.embedding.weight\n"
    )


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run), "--workers", "2"]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert first.startswith(f"{run}/checkpoints/step-00000100: ok, ")
    assert first.endswith(" MB/s)")
    assert second.startswith(f"{run}/checkpoints/step-00000200: ok, ")
    assert captured.err == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path),
        lambda path: flip(path, path.stat().st_size - 1),  # in the checksum itself
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: shutil.copy(path.with_name("c.2.0"), path),  # a sound chunk, but another one
    ],
    ids=["flipped", "checksum", "truncated", "empty", "missing", "other"],
)
def test_verify_names_the_damaged_file(run: Path, damage, capsys: pytest.CaptureFixture[str]) -> None:
    """The damaged step is the newest, which a search for a complete one would skip."""
    path = run / "checkpoints/step-00000200/model.embedding.weight/c.1.0"
    damage(path)
    assert main(["checkpoint", "verify", str(run)]) == 1
    captured = capsys.readouterr()
    assert "step-00000100: ok" in captured.out
    assert f"{path.parents[1]}: damaged\n" in captured.err
    assert str(path) in captured.err


def test_verify_refuses_no_workers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run), "--workers", "0"]) == 2
    assert capsys.readouterr().err == "griffin: error: --workers 0: must be at least 1\n"


def write_step(target: Path, manifest: Manifest, arrays: Path) -> None:
    """Write the step at `arrays` with another manifest."""
    tmp = target.with_name(f"{target.name}.tmp")
    shutil.copytree(arrays, tmp, ignore=shutil.ignore_patterns("manifest.json"))
    (tmp / "zarr.json").unlink()
    files = read_manifest(arrays).files
    commit(tmp, replace(manifest, files={name: files[name] for name in manifest.chunk_files()}))


def diff(*words: object) -> int:
    return main(["checkpoint", "diff", *map(str, words), "--workers", "1"])


def test_diff_of_equal_checkpoints_with_other_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "a", tensors=FEW)
    make_checkpoint(tmp_path / "b", tensors=FEW, cuts=2)
    assert read_manifest(tmp_path / "a").arrays != read_manifest(tmp_path / "b").arrays
    assert diff(tmp_path / "a", tmp_path / "b") == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["9 of 9 arrays are equal bit by bit"]


def test_diff_of_equal_checkpoints_of_other_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where and when a training ran is printed, but does not count as a difference."""
    config = config_json(parallel=ParallelConfig(tensor=2))
    config["log"]["interval"] = 7
    config["checkpoint"]["interval"] = 8
    make_checkpoint(tmp_path / "a", tensors=FEW)
    make_checkpoint(tmp_path / "b", tensors=FEW, config=config)
    later = replace(
        read_manifest(tmp_path / "b"), attempt=3, created="2026-01-03", layout={"tensor": 2}, sources=("c",), files={}
    )
    write_step(tmp_path / "later", later, tmp_path / "b")
    assert diff(tmp_path / "a", tmp_path / "later") == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        *(
            f"{line} (does not count)"
            for line in (
                "attempt: 2 in a, 3 in b",
                'created: "2026-01-02T03:04:05+0000" in a, "2026-01-03" in b',
                'sources: [] in a, ["c"] in b',
                "layout.tensor: 1 in a, 2 in b",
                "layout.pipeline: 1 in a, not set in b",
                "layout.virtual_pipeline: 1 in a, not set in b",
                "layout.sequence_parallel: false in a, not set in b",
                "layout.data: 1 in a, not set in b",
                "checkpoint.interval: 1000 in a, 8 in b",
                "log.interval: 10 in a, 7 in b",
                "parallel.tensor: 1 in a, 2 in b",
            )
        ),
        "9 of 9 arrays are equal bit by bit",
    ]
    config["optimizer"]["weight_decay"] = 0.5
    make_checkpoint(tmp_path / "c", tensors=FEW, config=config)
    assert diff(tmp_path / "later", tmp_path / "c") == 1


def test_diff_counts_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed differences equal those computed from the values, including those in the last chunk."""
    a = make_checkpoint(tmp_path / "a", tensors=FEW, dtype="bfloat16", seed=1)
    b = make_checkpoint(tmp_path / "b", tensors=FEW, dtype="bfloat16", seed=2, step=101)
    assert diff(tmp_path / "a", tmp_path / "b") == 1
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[:3] == [
        "step: 100 in a, 101 in b",
        "samples: 400 in a, 404 in b",
        'optimizer: {"name": "adamw", "step": 100} in a, {"name": "adamw", "step": 101} in b',
    ]
    assert lines[-1] == "3 of 12 arrays are equal bit by bit"  # the second moments, all zero
    assert len(lines) == 3 + 9 + 1
    for name in ("model.embedding.weight", "optimizer.master.blocks.0.mlp.down.weight"):
        x, y = a[name].astype(np.float64), b[name].astype(np.float64)
        differing = a[name] != b[name]
        absolute = np.abs(x - y).max()
        relative = (np.abs(x - y)[differing] / np.maximum(np.abs(x), np.abs(y))[differing]).max()
        assert (
            f"{name}: {differing.sum():,} of {x.size:,} elements differ, by at most {absolute:.3g} "
            f"({relative:.3g} relative)" in lines
        )
    assert diff(tmp_path / "a", tmp_path / "b", "--weights-only") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 3 arrays are equal bit by bit"


def test_diff_of_bits_that_are_equal_or_no_numbers() -> None:
    from griffin.tools.checkpoints.comparison import Difference, difference

    zeros, nans = np.zeros(3, np.float32), np.full(3, np.nan, np.float32)
    assert difference("x", nans, nans) == Difference("x", 3)
    assert difference("x", zeros, -zeros) == Difference("x", 3, 3)  # other bits, equal values
    for pair in ((zeros, nans), (nans, zeros)):
        found = Difference("x").merged(difference("x", *pair)).merged(Difference("x", 5))
        assert (found.elements, found.differing) == (8, 3)
        assert np.isnan(found.absolute)
    half = zeros.astype(ml_dtypes.bfloat16)
    assert difference("x", zeros, half) == Difference("x", 3)
    assert difference("x", zeros + 1, half) == Difference("x", 3, 3, 1.0, 1.0)


def test_diff_names_what_only_one_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = GlobalTensor(name="final_norm.weight", shape=(16,))
    config = config_json()
    config["train"]["steps"] = 7
    make_checkpoint(tmp_path / "a", tensors=FEW, weights_only=True)
    make_checkpoint(tmp_path / "b", tensors=[FEW[0], other], weights_only=True, config=config)
    assert diff(tmp_path / "a", tmp_path / "b") == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "train.steps: 10000 in a, 7 in b",
        "model.blocks.0.mlp.down.weight: only in a",
        "model.final_norm.weight: shape [8] in a, [16] in b",
        "1 of 3 arrays are equal bit by bit",
    ]
    make_checkpoint(tmp_path / "c", tensors=FEW, config=config, step=5)
    assert diff(tmp_path / "a", tmp_path / "c", "--weights-only") == 0


def test_diff_refuses_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints/step-00000100/optimizer.exp_avg.final_norm.weight/c.0"
    flip(path)
    assert diff(path.parents[1], run) == 2
    assert str(path) in capsys.readouterr().err

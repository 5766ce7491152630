from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from griffin.tools.cli import main
from griffin.trainer.checkpoint.arrays import GlobalTensor
from griffin.trainer.checkpoint.manifest import read_manifest, verify
from tests.checkpoints import FEW, assert_equal_arrays, config_json, make_checkpoint, read_arrays, reshard, small_chunks

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def chunks() -> Iterator[None]:
    with small_chunks():
        yield


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The checkpoint of a float32 training, and its arrays."""
    folder = tmp_path_factory.mktemp("float32") / "step-00000100"
    return folder, make_checkpoint(folder, tensors=FEW)


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """That of a bfloat16 training with the same master weights."""
    folder = tmp_path_factory.mktemp("bfloat16") / "step-00000100"
    return folder, make_checkpoint(folder, tensors=FEW, dtype="bfloat16")


def refused(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """Return the error's single line, after checking that `folder` holds no output."""
    error = capsys.readouterr().err
    assert error.startswith("griffin: error: ")
    assert error.count("\n") == 1
    assert not list(folder.iterdir())
    return error


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_chunks_are_those_of_the_layout(
    bfloat16: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, tensor: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source, values = bfloat16
    target = tmp_path / "out"
    assert reshard(source, target, "--tensor", tensor, "--pipeline", 2) == 0
    manifest, old = verify(target), read_manifest(source)
    assert_equal_arrays(read_arrays(target), values)
    for spec in manifest.arrays.values():
        axis = spec.tensor.axis
        if axis is None:
            assert spec.chunks == spec.shape
            continue
        held = [spec.tensor.part(rank, tensor)[axis] for rank in range(tensor)]
        for index in spec.indices():  # each chunk lies within one rank's part, however small the tensor
            part = spec.box(index)[axis]
            assert sum(some.start <= part.start < part.stop <= some.stop for some in held) == 1
    sizes = {spec.tensor.elements * 4 for spec in manifest.arrays.values() if spec.tensor.axis is not None}
    assert min(sizes) <= 256 < max(sizes)  # training would leave the smaller ones whole
    assert manifest.layout == {
        "tensor": tensor,
        "pipeline": 2,
        "virtual_pipeline": 1,
        "sequence_parallel": False,
        "data": 1,
    }
    for name in ("step", "samples", "attempt", "config", "optimizer", "random", "spikes", "extras"):
        assert getattr(manifest, name) == getattr(old, name)
    size = sum(spec.nbytes for spec in manifest.arrays.values())
    chunks = len(list(manifest.chunk_files()))
    words = capsys.readouterr().out
    assert words.startswith(f"{target}: {len(values)} arrays, {chunks} files, {size:,} bytes in ")
    assert words.count("\n") == 1


def test_no_layout_gives_the_chunks_that_training_saves(
    float32: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    source, values = float32
    assert reshard(source, tmp_path / "one", "--tensor", 1) == 0
    assert reshard(tmp_path / "one", tmp_path / "out", workers=2) == 0
    assert_equal_arrays(read_arrays(tmp_path / "out"), values)
    found, expected = verify(tmp_path / "out"), read_manifest(source)
    assert read_manifest(tmp_path / "one").arrays != expected.arrays
    assert found.arrays == expected.arrays
    assert found.files.keys() == expected.files.keys()


def test_to_float32_and_back(
    float32: tuple[Path, dict[str, np.ndarray]], bfloat16: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """To float32: the model takes the master weights. Back: the model becomes the master weights, and is rounded."""
    assert reshard(bfloat16[0], tmp_path / "fp32", "--dtype", "fp32") == 0
    assert_equal_arrays(read_arrays(tmp_path / "fp32"), float32[1])
    assert reshard(tmp_path / "fp32", tmp_path / "bf16", "--dtype", "bf16") == 0
    assert_equal_arrays(read_arrays(tmp_path / "bf16"), bfloat16[1])
    assert verify(tmp_path / "bf16").arrays == read_manifest(bfloat16[0]).arrays


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", None])
def test_weights_only(bfloat16: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, dtype: str | None) -> None:
    """Weights are rounded from the master weights: float16 keeps bits that bfloat16 does not have."""
    source, values = bfloat16
    words = ["--dtype", dtype] if dtype else []
    assert reshard(source, tmp_path / "out", "--weights-only", *words) == 0
    numpy_dtype: Any = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32, None: ml_dtypes.bfloat16}
    expected = {
        f"model.{tensor.name}": values[f"optimizer.master.{tensor.name}"].astype(numpy_dtype[dtype]) for tensor in FEW
    }
    assert_equal_arrays(read_arrays(tmp_path / "out"), expected)
    manifest = verify(tmp_path / "out")
    assert (manifest.optimizer, manifest.random, manifest.spikes) == (None, {}, None)
    assert manifest.extras == read_manifest(source).extras
    assert manifest.step == 100


def test_rounding_is_to_nearest_even(tmp_path: Path) -> None:
    """Halfway between two bfloat16 values: to the one with an even mantissa. Just above: up."""
    tensor = GlobalTensor(name="blocks.0.w", shape=(4,))
    make_checkpoint(tmp_path / "source", tensors=[tensor], weights_only=True)
    from griffin.tools.checkpoints.sources import open_step
    from griffin.tools.checkpoints.write import OutputArray

    class Stored:
        spec = read_manifest(tmp_path / "source").arrays["model.blocks.0.w"]

        def read(self, box: Any) -> np.ndarray:
            return np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF80FFFF], np.uint32).view(np.float32)[box]

    source = open_step(tmp_path / "source").arrays["model.blocks.0.w"]
    output = OutputArray(dataclasses.replace(source.spec, dtype="bfloat16"), (Stored(),))
    assert output.read((slice(0, 4),)).view(np.uint16).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF81]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_that_do_not_fit_are_refused(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = {"bfloat16": 3.4e38, "float16": 70000.0}[dtype]
    random = np.random.default_rng

    class Large:
        def __init__(self, seed: Any) -> None:
            self.generator = random(seed)

        def standard_normal(self, shape: Any, kind: Any) -> np.ndarray:
            return self.generator.standard_normal(shape, kind) * 0 + largest

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", Large)
        make_checkpoint(tmp_path / "source/step", tensors=FEW[-1:], weights_only=True)
    (tmp_path / "out").mkdir()
    name = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    assert reshard(tmp_path / "source/step", tmp_path / "out/step", "--dtype", name) == 2
    assert f"model.final_norm.weight: {largest:g} does not fit {dtype}" in refused(capsys, tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--tensor", 3],
            "--tensor 3: must divide the 64 parts that embedding.weight can be cut into; accepted: 1, 2, 4",
        ),
        (["--tensor", 0], "--tensor 0: must be at least 1"),
        (["--virtual", -1], "--virtual -1: must be at least 1"),
        (["--pipeline", 3, "--virtual", 2], "--pipeline 3 x --virtual 2 = 6 stages: must be at most the number of"),
        (["--virtual", 2], "--virtual 2: must be 1 where --pipeline is 1"),
        (["--dtype", "fp16"], "--dtype fp16: needs --weights-only"),
        (["--from-ranks"], "index.json: No such file or directory"),
    ],
)
@pytest.mark.parametrize("rank_files", [False, True])
def test_refused_before_anything_is_written(
    float32: tuple[Path, Any],
    tmp_path: Path,
    words: list[object],
    message: str,
    rank_files: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reshard(float32[0], tmp_path / "out", *words, *(["--rank-files"] if rank_files else [])) == 2
    assert message in refused(capsys, tmp_path)


def test_workers_are_at_least_one(float32: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert reshard(float32[0], tmp_path / "out", workers=0) == 2
    assert "--workers 0: must be at least 1" in refused(capsys, tmp_path)


@pytest.mark.parametrize("flags", [[], ["--rank-files"]])
def test_nothing_is_overwritten(
    float32: tuple[Path, Any], tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "other.tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name, message in {
        "file": "file: exists, and is not overwritten",
        "folder": "folder: exists, and is not overwritten",
        "link": "link: exists, and is not overwritten",
        "other": "other.tmp: exists; it is being written, or was left by a killed command",
        "absent/out": "absent does not",
    }.items():
        assert reshard(float32[0], tmp_path / name, *flags) == 2
        assert message in capsys.readouterr().err
    assert main(["checkpoint", "average", str(float32[0]), str(float32[0]), str(tmp_path / "folder")]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("flags", [[], ["--rank-files"]])
@pytest.mark.parametrize("name", ["step-00000100", "step-123456789", "step-00000100.tmp", "step-00000100.deleted"])
def test_steps_of_a_run_are_refused_as_target(
    float32: tuple[Path, Any], tmp_path: Path, name: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True)
    (run / "config.toml").touch()
    (tmp_path / "link").symlink_to(checkpoints)
    for parent in (checkpoints, tmp_path / "link"):
        assert reshard(float32[0], parent / name, *flags) == 2
        error = refused(capsys, checkpoints)
        assert f"{parent / name}: must not be among the steps of a run ({run})" in error
        assert "choose a name other than step-NUMBER, or another folder" in error
    assert main(["checkpoint", "average", str(float32[0]), str(float32[0]), str(checkpoints / name)]) == 2
    assert "must not be among the steps of a run" in refused(capsys, checkpoints)


def test_other_names_and_folders_are_accepted(float32: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.toml").touch()
    (tmp_path / "elsewhere/checkpoints").mkdir(parents=True)
    for name in ("run/checkpoints/resharded", "run/step-00000100", "elsewhere/checkpoints/step-00000100"):
        assert reshard(float32[0], tmp_path / name, "--weights-only") == 0
        verify(tmp_path / name)


@pytest.mark.parametrize("flags", [[], ["--rank-files"]])
@pytest.mark.parametrize(
    ("damage", "workers"),
    [
        (lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]), 2),
        (lambda path: path.unlink(), 1),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), 1),
        (lambda path: path.write_bytes(b""), 1),
        (lambda path: shutil.copy(path.with_name("c.1.0"), path), 1),
    ],
    ids=["flipped", "missing", "truncated", "empty", "other"],
)
def test_damaged_sources_are_refused_and_leave_nothing(
    float32: tuple[Path, Any],
    tmp_path: Path,
    damage: Any,
    workers: int,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path(shutil.copytree(float32[0], tmp_path / "source"))
    (tmp_path / "out").mkdir()
    path = source / "optimizer.exp_avg.embedding.weight/c.2.0"
    damage(path)
    assert reshard(source, tmp_path / "out/step", *flags, workers=workers) == 2
    assert str(path) in refused(capsys, tmp_path / "out")


def average(*words: object) -> int:
    return main(["checkpoint", "average", *map(str, words), "--workers", "1"])


def test_average(
    bfloat16: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Means of master weights, if there are any, in float64; in the dtype of the newest checkpoint's weights."""
    a = bfloat16[1]
    b = make_checkpoint(tmp_path / "b", tensors=FEW, seed=2, step=300, dtype="bfloat16", cuts=2)
    c = make_checkpoint(tmp_path / "c", tensors=FEW, seed=3, step=200, weights_only=True, cuts=1)
    assert average(bfloat16[0], tmp_path / "b", tmp_path / "c", tmp_path / "mean") == 0
    means = {
        f"model.{tensor.name}": (
            (
                a[f"optimizer.master.{tensor.name}"].astype(np.float64)
                + b[f"optimizer.master.{tensor.name}"].astype(np.float64)
                + c[f"model.{tensor.name}"].astype(np.float64)
            )
            / 3
        ).astype(np.float32)
        for tensor in FEW
    }
    assert_equal_arrays(
        read_arrays(tmp_path / "mean"), {name: value.astype(ml_dtypes.bfloat16) for name, value in means.items()}
    )
    manifest = verify(tmp_path / "mean")
    assert (manifest.step, manifest.samples, manifest.optimizer, manifest.random) == (300, 1200, None, {})
    assert manifest.sources == (str(bfloat16[0]), str(tmp_path / "b"), str(tmp_path / "c"))
    assert manifest.layout == read_manifest(tmp_path / "b").layout
    assert manifest.extras == {"ramp": {"sizes": [8, 300], "ends": None}}  # of the newest
    assert main(["checkpoint", "inspect", str(tmp_path / "mean")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in shown if line.startswith("made from ")] == list(manifest.sources)
    assert reshard(tmp_path / "mean", tmp_path / "ranks", "--rank-files") == 0
    assert reshard(tmp_path / "ranks", tmp_path / "again", "--from-ranks") == 0
    assert read_manifest(tmp_path / "again").sources == manifest.sources
    assert average(bfloat16[0], tmp_path / "b", tmp_path / "c", tmp_path / "fp32", "--dtype", "fp32") == 0
    assert_equal_arrays(read_arrays(tmp_path / "fp32"), means)


def test_average_refuses_other_models_and_single_checkpoints(
    float32: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert average(float32[0], tmp_path / "out/mean") == 2
    assert "needs at least two checkpoints SRC... and, last, DST" in refused(capsys, tmp_path / "out")
    config = config_json()
    config["model"]["window"] = 7
    make_checkpoint(tmp_path / "other", tensors=FEW[:1], step=7, config=config)
    assert average(float32[0], tmp_path / "other", tmp_path / "out/mean") == 2
    error = refused(capsys, tmp_path / "out")
    assert f"{tmp_path}/other: holds another model: model.window is 7 there, 1024 in {float32[0]}" in error
    assert "final_norm.weight is missing there, (8,) in" in error

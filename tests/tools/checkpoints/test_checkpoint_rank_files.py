"""Rank files: read by the safetensors library, converted between layouts, and damaged."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from griffin.parallel.config import ParallelConfig
from griffin.parallel.sharding import named_pieces
from griffin.parallel.stage import meta_stage, stage_blocks
from griffin.parallel.world.grid import single_rank_grid
from griffin.tools.checkpoints import write
from griffin.tools.checkpoints.rank_files import index_checksum, lay_out
from griffin.tools.common import safetensors_files
from griffin.trainer.checkpoint.arrays import GlobalTensor, state_arrays
from griffin.trainer.checkpoint.manifest import read_manifest, verify
from tests.checkpoints import (
    MODEL_CONFIG,
    TENSORS,
    assert_equal_arrays,
    config_json,
    make_checkpoint,
    read_arrays,
    reshard,
    small_chunks,
)

LAYOUTS = {
    "t1p1": ParallelConfig(),
    "t2p1": ParallelConfig(tensor=2),
    "t1p2": ParallelConfig(pipeline=2),
    "t2p2": ParallelConfig(tensor=2, pipeline=2),
    "t2p3": ParallelConfig(tensor=2, pipeline=3),
    "t4p1": ParallelConfig(tensor=4),  # the last rank holds padding of the vocabulary only
    "p2v2": ParallelConfig(pipeline=2, virtual_pipeline=2),
}
PAIRED = ("t1p1", "t2p1", "t1p2", "t2p2", "p2v2")


def flags(layout: ParallelConfig) -> list[str]:
    sizes = {"--tensor": layout.tensor, "--pipeline": layout.pipeline, "--virtual": layout.virtual_pipeline}
    return [word for flag, size in sizes.items() for word in (flag, str(size))]


@pytest.fixture(autouse=True, scope="module")
def chunks() -> Iterator[None]:
    with small_chunks(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "CHUNK_BYTES", 2048)
        patch.setattr(safetensors_files, "READ_BYTES", 300)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a bfloat16 training."""
    folder = tmp_path_factory.mktemp("source") / "step-00000100"
    make_checkpoint(folder, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def written(source: Path) -> dict[str, Path]:
    """The source as rank files of every layout."""
    folders = {}
    for name, layout in LAYOUTS.items():
        folders[name] = source.with_name(name)
        assert reshard(source, folders[name], "--rank-files", *flags(layout)) == 0
    return folders


def contents(folder: Path) -> dict[str, object]:
    """Return every file's bytes, and the index without its time and checksum."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    index = json.loads((folder / "index.json").read_text())
    del index["created"], index["checksum"]
    return found | {"index.json": index}


def rank_of(tensor: str, layout: ParallelConfig, stages: tuple[int, ...]) -> set[int]:
    """Return the pipeline ranks that hold a tensor: rank s mod P holds stage s."""
    count = len(stages)
    if tensor == "embedding.weight":
        return {0, (count - 1) % layout.pipeline}
    if tensor == "final_norm.weight":
        return {(count - 1) % layout.pipeline}
    of_block = [stage for stage, blocks in enumerate(stages) for _ in range(blocks)]
    return {of_block[int(tensor.split(".")[1])] % layout.pipeline}


@pytest.mark.parametrize("name", LAYOUTS)
def test_stock_readers_find_each_ranks_parts(source: Path, written: dict[str, Path], name: str) -> None:
    """Shards equal slices of the global arrays, cut with numpy as training does, the vocabulary padded with zeros."""
    layout, values = LAYOUTS[name], read_arrays(source)
    tensors = {tensor.name: tensor for tensor in TENSORS}
    stages = stage_blocks(MODEL_CONFIG, layout, 2048)
    assert len(set(stages)) > 1 or layout.pipeline < 3, "an uneven split"
    files = set()
    for tensor_rank in range(layout.tensor):
        for pipeline_rank in range(layout.pipeline):
            file = f"model-tp-0{tensor_rank}-of-0{layout.tensor}-pp-0{pipeline_rank}-of-0{layout.pipeline}.safetensors"
            files.add(file)
            expected = {}
            for array, value in values.items():
                tensor = tensors[array.split(".", 2 if array.startswith("optimizer") else 1)[-1]]
                if pipeline_rank not in rank_of(tensor.name, layout, stages):
                    continue
                if tensor.axis is not None:
                    padding = (tensor.padded or tensor.shape[tensor.axis]) - tensor.shape[tensor.axis]
                    widths = [(0, padding if axis == tensor.axis else 0) for axis in range(value.ndim)]
                    value = np.split(np.pad(value, widths), layout.tensor, tensor.axis)[tensor_rank]
                expected[array] = np.ascontiguousarray(value)
            with safe_open(written[name] / file, "pt") as opened:
                assert set(opened.keys()) == expected.keys()
                assert opened.metadata() == {"format": "pt"}
                for array, value in expected.items():
                    found = opened.get_tensor(array)
                    assert str(found.dtype) == f"torch.{value.dtype}"
                    assert tuple(found.shape) == value.shape
                    assert found.view(torch.uint8).numpy().tobytes() == value.tobytes(), array
            header = (written[name] / file).read_bytes()[:8]
            assert struct.unpack("<Q", header)[0] % 8 == 0
    index = json.loads((written[name] / "index.json").read_text())
    assert (
        {path.name for path in written[name].iterdir()}
        == files | {"index.json"}
        == set(index["files"]) | {"index.json"}
    )
    assert tuple(index["stages"]) == stages
    manifest = read_manifest(source)
    for key in ("step", "samples", "config", "optimizer", "random", "spikes", "extras"):
        assert index[key] == getattr(manifest, key)
    embedding = index["arrays"]["model.embedding.weight"]
    assert {key: embedding[key] for key in ("shape", "axis", "padded", "atoms", "dtype")} == {
        "shape": [130, 8],
        "axis": 0,
        "padded": 256,
        "atoms": 64,
        "dtype": "bfloat16",
    }
    assert set(embedding["files"]) == {
        file for file in files if int(file.split("-pp-")[1][:2]) in (0, layout.pipeline - 1)
    }


@pytest.mark.parametrize(("start", "to"), [*itertools.product(PAIRED, PAIRED), ("t4p1", "t2p2"), ("t2p2", "t4p1")])
def test_any_layout_goes_to_any_other(written: dict[str, Path], tmp_path: Path, start: str, to: str) -> None:
    """The result is bitwise that made from the Zarr checkpoint, including the index."""
    assert reshard(written[start], tmp_path / "out", "--from-ranks", "--rank-files", *flags(LAYOUTS[to])) == 0
    assert contents(tmp_path / "out") == contents(written[to])


def test_back_to_zarr(source: Path, written: dict[str, Path], tmp_path: Path) -> None:
    assert reshard(written["t2p2"], tmp_path / "out", "--from-ranks", workers=2) == 0
    assert_equal_arrays(read_arrays(tmp_path / "out"), read_arrays(source))
    found, expected = verify(tmp_path / "out"), read_manifest(source)
    assert found.arrays == expected.arrays
    assert found.config == expected.config
    assert found.layout["tensor"] == 2
    for name in ("step", "samples", "optimizer", "random", "spikes", "extras"):
        assert getattr(found, name) == getattr(expected, name)


def test_an_index_without_newer_keys(written: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["t1p1"], tmp_path / "source"))
    values = json.loads((folder / "index.json").read_text())
    del values["checksum"], values["spikes"], values["extras"]
    (folder / "index.json").write_text(json.dumps({"checksum": index_checksum(values)} | values))
    assert reshard(folder, tmp_path / "out", "--from-ranks") == 0
    found = verify(tmp_path / "out")
    assert (found.spikes, found.extras) == (None, {})


def test_weights_of_another_dtype(source: Path, written: dict[str, Path], tmp_path: Path) -> None:
    words = ["--from-ranks", "--rank-files", "--weights-only", "--dtype", "fp16", "--tensor", "2"]
    assert reshard(written["t1p2"], tmp_path / "out", *words) == 0
    with safe_open(tmp_path / "out/model-tp-00-of-02-pp-00-of-01.safetensors", "np") as file:
        assert {name.split(".")[0] for name in list(file.keys())} == {"model"}
        master = read_arrays(source)["optimizer.master.blocks.3.mlp.down.weight"]
        expected = master[:, :12].astype(np.float16)
        np.testing.assert_array_equal(file.get_tensor("model.blocks.3.mlp.down.weight"), expected)
    assert reshard(tmp_path / "out", tmp_path / "zarr", "--from-ranks") == 0
    assert verify(tmp_path / "zarr").optimizer is None


def test_every_tensor_of_a_model_has_its_ranks() -> None:
    """Every tensor that training saves is placed, with the shape that its tensor ranks hold."""
    with single_rank_grid() as grid:
        pieces = {piece.name: piece for piece, _ in named_pieces([meta_stage(MODEL_CONFIG, grid)])}
    specs = state_arrays(
        [
            GlobalTensor(name=piece.name, shape=piece.shape, axis=piece.axis, atoms=piece.atoms, padded=piece.padded)
            for piece in pieces.values()
        ],
        "bfloat16",
        2,
    )
    found: dict[str, int] = {}
    for file in lay_out(specs, LAYOUTS["t2p2"], (2, 2)):
        for shard in file.shards:
            assert shard.shape == pieces[shard.spec.tensor.name].local_shape(2)
            found[shard.spec.name] = found.get(shard.spec.name, 0) + 1
    assert found == {spec.name: 4 if spec.tensor.name == "embedding.weight" else 2 for spec in specs}


def test_a_stated_split_is_kept(tmp_path: Path) -> None:
    """parallel.stages of the run's config is used if it has as many stages."""
    config = config_json(parallel=ParallelConfig(pipeline=2, stages=(1, 3)))
    make_checkpoint(tmp_path / "source", config=config, weights_only=True)
    assert reshard(tmp_path / "source", tmp_path / "two", "--rank-files", "--pipeline", 2) == 0
    assert json.loads((tmp_path / "two/index.json").read_text())["stages"] == [1, 3]
    with safe_open(tmp_path / "two/model-tp-00-of-01-pp-01-of-02.safetensors", "np") as file:
        assert {name.split(".")[2] for name in list(file.keys()) if "blocks" in name} == {"1", "2", "3"}
    assert reshard(tmp_path / "two", tmp_path / "four", "--from-ranks", "--rank-files", "--pipeline", 4) == 0
    assert json.loads((tmp_path / "four/index.json").read_text())["stages"] == [1, 1, 1, 1]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


FILE = "model-tp-01-of-02-pp-00-of-02.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (FILE, lambda path: path.unlink(), "is missing"),
        (FILE, lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (FILE, lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
        (FILE, lambda path: flip(path, 50), "its header was changed"),
        (FILE, lambda path: flip(path, path.stat().st_size - 1), "does not match its checksum in index.json"),
        (FILE, lambda path: flip(path, path.stat().st_size // 2), "does not match its checksum in index.json"),
        # The last stage's copy of the embedding is not read.
        ("model-tp-01-of-02-pp-01-of-02.safetensors", lambda path: flip(path, 9000), "does not match its checksum"),
        ("index.json", lambda path: path.unlink(), "No such file"),
        ("index.json", lambda path: path.write_text(path.read_text().replace("100", "101", 1)), "was edited"),
        ("index.json", lambda path: path.write_text("{"), "was edited"),
    ],
    ids=["missing", "truncated", "empty", "header", "last", "middle", "copy", "no-index", "edited", "no-json"],
)
def test_damaged_rank_files_are_refused(
    written: dict[str, Path], tmp_path: Path, file: str, damage, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(written["t2p2"], tmp_path / "source"))
    damage(folder / file)
    (tmp_path / "out").mkdir()
    assert reshard(folder, tmp_path / "out/step", "--from-ranks") == 2
    error = capsys.readouterr().err
    assert str(folder / file) in error
    assert message in error
    assert not list((tmp_path / "out").iterdir())


def test_rank_files_need_their_flag(
    written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reshard(written["t2p2"], tmp_path / "out") == 2
    assert "holds one file per rank; add --from-ranks to read them" in capsys.readouterr().err

"""Convert weights of transformers and export them again, bit by bit; damaged and wrong folders."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from griffin.tools.checkpoints import write as checkpoint_write
from griffin.tools.cli import main
from griffin.tools.common import safetensors_files
from griffin.tools.weights.hf import read as hf_read
from griffin.tools.weights.hf import write as hf_write
from griffin.trainer.checkpoint.arrays import numpy_dtype
from griffin.trainer.checkpoint.manifest import read_manifest, verify
from tests.checkpoints import read_arrays, small_chunks
from tests.transformers_models import (
    assert_same_bits,
    change_json,
    convert,
    export,
    load_model,
    logits,
    make_model,
    save_model,
    tokens,
)


@pytest.fixture(autouse=True, scope="module")
def chunks() -> Iterator[None]:
    """Give tensors several chunks, and read a few rows at a time."""
    with small_chunks(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_read, "CHUNK_BYTES", 1000)
        patch.setattr(hf_write, "CHUNK_BYTES", 1000)
        patch.setattr(safetensors_files, "READ_BYTES", 300)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 model in several shards."""
    return save_model(make_model(torch.bfloat16), tmp_path_factory.mktemp("saved") / "model", shard_size="20KB")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the model in one file, to be changed."""
    return save_model(load_model(saved), tmp_path / "model")


def refused(capsys: pytest.CaptureFixture[str], target: Path) -> str:
    """Return the error's single line, after checking that no output is left."""
    error = capsys.readouterr().err
    assert error.startswith("griffin: error: ")
    assert error.count("\n") == 1
    assert not target.exists()
    assert not target.with_name(f"{target.name}.tmp").exists()
    return error


@pytest.mark.parametrize(
    ("dtype", "shard_size", "changes"),
    [
        (torch.float32, "1GB", {}),
        (torch.bfloat16, "20KB", {}),
        (torch.float16, "1GB", {"num_attention_heads": 2, "head_dim": 16}),
        (torch.bfloat16, "1GB", {"num_attention_heads": 8, "head_dim": 4, "lru_width": 32, "attention_window_size": 1}),
        (torch.float32, "20KB", {"num_hidden_layers": 7, "head_dim": 24, "intermediate_size": 128, "vocab_size": 129}),
        (torch.bfloat16, "1GB", {"block_types": ["recurrent", "attention"], "num_attention_heads": 1}),
    ],
)
def test_round_trip(
    tmp_path: Path, dtype: torch.dtype, shard_size: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """All tensors and the logits are bitwise the same."""
    model = make_model(dtype, **changes)
    source = save_model(model, tmp_path / "source", shard_size=shard_size)
    assert (len(list(source.glob("*.safetensors"))) > 3) == (shard_size == "20KB")
    assert convert("hf", source, tmp_path / "step") == 0
    manifest = verify(tmp_path / "step")
    assert {spec.dtype for spec in manifest.arrays.values()} == {str(dtype).removeprefix("torch.")}
    assert (manifest.step, manifest.samples, manifest.optimizer, manifest.random) == (0, 0, None, {})
    assert manifest.sources == (str(source),)
    assert any(len(list(spec.indices())) > 1 for spec in manifest.arrays.values())
    assert export(tmp_path / "step", tmp_path / "back") == 0
    assert capsys.readouterr().err == ""
    back = load_model(tmp_path / "back")
    assert_same_bits(back.state_dict(), model.state_dict())
    ids = tokens(model.config.vocab_size)
    # Loaded in the stored dtype: a cast in memory would round the rotary frequencies too.
    assert_same_bits({"": logits(back, ids)}, {"": logits(load_model(source), ids)})
    found, expected = back.config.to_diff_dict(), model.config.to_diff_dict()
    for settings in (found, expected):  # repeated there, stated in full by us
        settings["block_types"] = (100 * settings["block_types"])[: model.config.num_hidden_layers]
    assert found == expected
    assert main(["checkpoint", "inspect", str(tmp_path / "step")]) == 0
    assert f"made from  {source}" in capsys.readouterr().out


def test_several_workers(saved: Path, tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())  # other tests' ranks
    assert convert("hf", saved, tmp_path / "step", workers=2) == 0
    assert export(tmp_path / "step", tmp_path / "back", "--shard-size", "2e-5", workers=2) == 0
    files = sorted(path.name for path in (tmp_path / "back").iterdir())
    shards = sum(name.endswith(".safetensors") for name in files)
    assert shards > 3
    assert f"model-00001-of-{shards:05d}.safetensors" in files
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    expected = load_model(saved).state_dict()
    del expected["lm_head.weight"]
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    assert_same_bits(load_model(tmp_path / "back").state_dict(), load_model(saved).state_dict())
    assert set(multiprocessing.active_children()) == before


def test_odd_bits_survive(copy: Path, tmp_path: Path) -> None:
    """NaNs with payloads, infinities, subnormal numbers, negative zeros."""
    state = load_file(copy / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randint(-(2**15), 2**15, value.shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
        for name, value in state.items()
    }
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    assert convert("hf", copy, tmp_path / "step") == 0
    assert export(tmp_path / "step", tmp_path / "back") == 0
    assert_same_bits(load_file(tmp_path / "back/model.safetensors"), state)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_dtype(copy: Path, tmp_path: Path, name: str) -> None:
    """Values are rounded to nearest, and kept from bfloat16 to float32. Mixed dtypes are kept unless one is stated."""
    state = load_file(copy / "model.safetensors")
    state["model.final_norm.weight"] = state["model.final_norm.weight"].float() + 1e-5
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    assert convert("hf", copy, tmp_path / "mixed") == 0
    assert export(tmp_path / "mixed", tmp_path / "back") == 0
    assert_same_bits(load_file(tmp_path / "back/model.safetensors"), state)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "float32"
    expected = {key: value.to(dtype) for key, value in state.items()}
    assert convert("hf", copy, tmp_path / "step", "--dtype", name) == 0
    assert export(tmp_path / "step", tmp_path / "rounded") == 0
    assert_same_bits(load_file(tmp_path / "rounded/model.safetensors"), expected)
    assert export(tmp_path / "mixed", tmp_path / "again", "--dtype", name) == 0
    assert_same_bits(load_file(tmp_path / "again/model.safetensors"), expected)


def test_too_large_for_the_dtype(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(copy / "model.safetensors")
    state["model.final_norm.weight"][3] = 1e6
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    assert convert("hf", copy, tmp_path / "step", "--dtype", "fp16", workers=2) == 2
    assert "model.final_norm.weight: 999424 does not fit float16" in refused(capsys, tmp_path / "step")


def test_report_and_auxiliary_files(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "tokenizer.json").write_text("{}")
    (copy / "README.md").write_text("mine")
    (copy / "chat_template.jinja").symlink_to(copy / "README.md")  # as a hub's cache has them
    assert convert("hf", copy, tmp_path / "step") == 0
    lines = capsys.readouterr().out.splitlines()
    arrays = read_manifest(tmp_path / "step").arrays
    assert lines[0].startswith(f"{tmp_path / 'step'}: {len(arrays)} arrays, ")
    parameters = sum(spec.tensor.elements for spec in arrays.values())
    assert lines[1] == f"{parameters:,} parameters; tokenizer files: tokenizer.json, chat_template.jinja"
    assert "[model]" in lines
    found = {path.name: path.read_bytes() for path in (tmp_path / "step/source").iterdir()}
    names = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json")
    assert found == {name: (copy / name).read_bytes() for name in names}
    verify(tmp_path / "step")
    for words in (["reshard", "step", "again", "--tensor", "2"], ["average", "step", "again", "mean"]):
        paths = [str(tmp_path / word) if word in ("step", "again", "mean") else word for word in words]
        assert main(["checkpoint", *paths, "--workers", "1"]) == 0
        made = Path(next(path for path in reversed(paths) if path.startswith(str(tmp_path))))
        assert {path.name: path.read_bytes() for path in (made / "source").iterdir()} == found


def test_output_projection_that_is_stored(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(copy / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.2.temporal_block.rotary_emb.inv_freq"] = torch.ones(2)
    state["model.normalizer"] = torch.ones(1)
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    assert convert("hf", copy, tmp_path / "step", workers=2) == 0
    assert not any("head" in name for name in read_manifest(tmp_path / "step").arrays)
    state["lm_head.weight"].view(torch.int16)[-1, -1] ^= 1
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert convert("hf", copy, tmp_path / "other") == 2
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(capsys, tmp_path / "other")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].float()
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    assert convert("hf", copy, tmp_path / "other") == 2
    assert "lm_head.weight differs from" in refused(capsys, tmp_path / "other")


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Return a function that changes the tensors of a folder's single file."""

    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return edit


GATE = "model.layers.0.mlp_block.gate_proj.weight"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (edited(lambda state: state.pop(GATE)), f"{GATE} is missing"),
    "unknown": (edited(lambda state: state.update(other=torch.ones(1))), "other is not a tensor of this model"),
    "shape": (
        edited(lambda state: state.update({GATE: state[GATE].t().contiguous()})),
        f"{GATE} is [32, 96], must be [96, 32]",
    ),
    "flat": (edited(lambda state: state.update({GATE: state[GATE].flatten()})), f"{GATE} is [3072], must be [96, 32]"),
    "many": (edited(lambda state: state.clear()), "; and 89 more"),
    "float64": (edited(lambda state: state.update({GATE: state[GATE].double()})), "is of dtype F64; must be F32, F16"),
    "int8": (edited(lambda state: state.update({GATE: state[GATE].to(torch.int8)})), "is of dtype I8; must be F32"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: No such file or directory"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not JSON"),
    "deep config": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: is not JSON"),
    "two models": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "holds model.safetensors and model.safetensors.index.json; must hold only one of them",
    ),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: must be a JSON object"),
    "llama": (lambda folder: change_json(folder / "config.json", model_type="llama"), "model_type = 'llama': must be"),
    "layers": (
        lambda folder: change_json(folder / "config.json", num_hidden_layers=4),
        "model.layers.4.channel_pre_norm.weight is not a tensor of this model",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor model"),
    "no folder": (shutil.rmtree, "must be a folder with config.json and model.safetensors"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_wrong_folders(copy: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = DAMAGED[case]
    change(copy)
    assert convert("hf", copy, tmp_path / "step") == 2
    error = refused(capsys, tmp_path / "step")
    assert message in error
    assert str(copy) in error


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


SHARD = "model-00002-of-"
SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda shard: shard.unlink(), "is missing; model.safetensors.index.json names it"),
    "truncated": (lambda shard: cut(shard, shard.stat().st_size - 1), " bytes instead of "),
    "in its header": (lambda shard: cut(shard, 100), "bytes too short"),
    "empty": (lambda shard: cut(shard, 0), "bytes too short"),
    "longer": (lambda shard: shard.write_bytes(shard.read_bytes() + b"x"), " bytes instead of "),
    "other": (
        lambda shard: shutil.copy(next(shard.parent.glob("model-00003-of-*")), shard),
        "model.safetensors.index.json says that it is there",
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_damaged_shards(saved: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(saved, tmp_path / "source"))
    (shard,) = source.glob(f"{SHARD}*")
    damage, message = SHARDS[case]
    damage(shard)
    assert convert("hf", source, tmp_path / "step") == 2
    error = refused(capsys, tmp_path / "step")
    assert str(shard) in error
    assert message in error


def test_index_that_disagrees_with_the_files(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(saved, tmp_path / "source"))
    index = source / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(names.values()))[:2]
    moved = next(name for name, file in names.items() if file == first)
    change_json(index, weight_map=names | {moved: second})
    assert convert("hf", source, tmp_path / "step") == 2
    assert f"{source / second}: {moved} is missing" in refused(capsys, tmp_path / "step")
    del names[moved]
    change_json(index, weight_map=names)
    assert convert("hf", source, tmp_path / "step") == 2
    assert f"{source / first}: {index.name} does not say that {moved} is there" in refused(capsys, tmp_path / "step")
    for wrong in (3, names | {moved: f"../{saved.name}/{first}"}, names | {moved: str(saved / first)}):
        index.write_text(json.dumps({"weight_map": wrong}))
        assert convert("hf", source, tmp_path / "step") == 2
        assert f'{index}: is damaged: "weight_map"' in refused(capsys, tmp_path / "step")


def test_nothing_is_overwritten(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("hf", saved, tmp_path / "step") == 0
    (tmp_path / "folder").mkdir()
    for word in ("step", "folder"):
        assert convert("hf", saved, tmp_path / word) == 2
        assert f"{tmp_path / word}: exists, and is not overwritten" in capsys.readouterr().err
        assert export(tmp_path / "step", tmp_path / word) == 2
        assert f"{tmp_path / word}: exists, and is not overwritten" in capsys.readouterr().err
    assert not list((tmp_path / "folder").iterdir())
    verify(tmp_path / "step")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted(
    saved: Path, tmp_path: Path, workers: int, error: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Interrupted in this process during the work: no output and no worker is left."""
    before = set(multiprocessing.active_children())
    assert convert("hf", saved, tmp_path / "step") == 0
    capsys.readouterr()

    class Bar:
        count = 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *args: object) -> None: ...

        def update(self, size: int) -> None:
            self.count += 1
            if self.count == 2:
                raise error

    for module in (checkpoint_write, hf_write):
        monkeypatch.setattr(module, "progress_bar", lambda name, size: Bar())
    for work, target in (
        (lambda: convert("hf", saved, tmp_path / "out", workers=workers), tmp_path / "out"),
        (lambda: export(tmp_path / "step", tmp_path / "out", workers=workers), tmp_path / "out"),
    ):
        if error is KeyboardInterrupt:
            assert work() == 130
            assert capsys.readouterr().err == "griffin: stopped by SIGINT\n"
            assert not target.exists()
            assert not target.with_name("out.tmp").exists()
        else:
            assert work() == 2
            assert "No space left on device" in refused(capsys, target)
        assert set(multiprocessing.active_children()) == before


def test_values_are_those_of_the_file(saved: Path, tmp_path: Path) -> None:
    """The only tensor of another shape is the convolution, [R, 1, taps] in transformers."""
    assert convert("hf", saved, tmp_path / "step") == 0
    values = read_arrays(tmp_path / "step")
    expected = load_model(saved).state_dict()["model.layers.3.temporal_block.conv_1d.weight"]
    found = values["model.blocks.3.recurrent.conv.weight"]
    assert found.dtype == ml_dtypes.bfloat16 == numpy_dtype("bfloat16")
    assert np.array_equal(found.astype(np.float32), expected.float().squeeze(1).t().numpy())

"""Export: models that transformers expresses differently or not at all, and the auxiliary files."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT, ModelConfig
from griffin.tools.cli import main
from griffin.tools.common.workers import start_workers
from griffin.tools.weights.imported import model_tensors, write_imported
from griffin.trainer.checkpoint.arrays import MODEL, ArraySpec, Box
from griffin.trainer.checkpoint.manifest import read_manifest
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.tokenizer_copy import copy_tokenizer
from tests.checkpoints import config_json, make_checkpoint, read_arrays, reshard
from tests.converted_models import GRIFFIN, LAYOUTS, batch, compute
from tests.deepmind_models import plain
from tests.ranks import RankPool
from tests.transformers_models import change_json, convert, export, load_model, logits, make_model, save_model


@dataclass(frozen=True)
class Stored:
    spec: ArraySpec
    values: np.ndarray

    def read(self, box: Box) -> np.ndarray:
        return self.values[box]


def write_model(folder: Path, model: ModelConfig) -> Path:
    """Write a checkpoint of random weights without zeros."""
    generator = np.random.default_rng(0)
    arrays = {}
    for tensor in model_tensors(model):
        values = generator.standard_normal(tensor.shape, np.float32)
        values *= 0.1 if values.ndim == 1 else values.shape[-1] ** -0.5
        if tensor.name.endswith("decay"):
            values -= 3
        if tensor.name == "embedding.weight":
            values *= 2
        spec = ArraySpec(kind=MODEL, tensor=tensor, dtype="float32", chunks=tensor.shape)
        arrays[tensor.name] = Stored(spec, values)
    with start_workers(1) as workers:
        assert workers is not None
        write_imported(folder, folder, model, arrays, workers, dtype=None, auxiliary={})
    return folder


CASES = {
    "two gate blocks a head": replace(GRIFFIN, gate_blocks=4),
    "six gate blocks a head": replace(GRIFFIN, gate_blocks=12),
    "hawk": replace(GRIFFIN, pattern=(RECURRENT,) * 3, gate_blocks=16),
    "no gates": replace(GRIFFIN, pattern=(ATTENTION,) * 2, gate_blocks=5),
    "narrow MLP": replace(GRIFFIN, mlp_expansion=1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_function(rank_pool: RankPool, tmp_path: Path, case: str) -> None:
    """Gates with more blocks than heads become block-diagonal; without attention, the number of heads is free."""
    model = CASES[case]
    folder = write_model(tmp_path / "step", model)
    assert export(folder, tmp_path / "out") == 0
    peer = load_model(tmp_path / "out")
    data = batch(model.vocabulary)
    expected = logits(peer, data["tokens"])
    assert expected.abs().max() > 5
    (answer,) = rank_pool.run(compute, 1, LAYOUTS["1-rank"], folder)
    # float32, sums in another order: 4e-6 measured.
    torch.testing.assert_close(answer["logits"].transpose(0, 1)[..., : model.vocabulary], expected, rtol=0, atol=1e-5)
    assert convert("hf", tmp_path / "out", tmp_path / "again") == 0
    (again,) = rank_pool.run(compute, 1, LAYOUTS["1-rank"], tmp_path / "again")
    torch.testing.assert_close(again["logits"], answer["logits"], rtol=0, atol=1e-5)
    found = read_manifest(tmp_path / "again").model
    merged = found.gate_blocks if RECURRENT in model.pattern else model.gate_blocks
    assert replace(found, gate_blocks=model.gate_blocks, heads=model.heads) == model
    assert merged in (model.heads, model.gate_blocks)


def test_merged_blocks_lie_on_the_diagonal(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "step", replace(GRIFFIN, gate_blocks=6))
    assert export(folder, tmp_path / "out") == 0
    state, values = load_model(tmp_path / "out").state_dict(), read_arrays(folder)
    for ours, theirs in (("input_gate", "input_gate"), ("recurrence_gate", "recurrent_gate")):
        weight = values[f"model.blocks.2.recurrent.{ours}.weight"]
        expected = np.zeros((2, 24, 24), np.float32)
        for block in range(6):
            part = slice(8 * (block % 3), 8 * (block % 3) + 8)
            expected[block // 3, part, part] = weight[block]
        prefix = f"model.layers.2.temporal_block.rg_lru.{theirs}"
        assert np.array_equal(state[f"{prefix}_weight"].numpy(), expected)
        bias = values[f"model.blocks.2.recurrent.{ours}.bias"]
        assert np.array_equal(state[f"{prefix}_bias"].numpy(), bias.reshape(2, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_blocks": 3}, "model.gate_blocks = 3: must be a multiple of model.heads = 2"),
        ({"gate_blocks": 1}, "model.gate_blocks = 1: must be a multiple of model.heads = 2"),
        ({"logit_soft_cap": 0.0}, "model.logit_soft_cap = 0: must be above 0"),
        ({"scale_embedding": False}, "model.scale_embedding = false: must be true"),
        ({"pattern": (GLOBAL_ATTENTION, RECURRENT, ATTENTION)}, "model.pattern = 'global_attention': must hold"),
    ],
)
def test_models_that_transformers_does_not_have(
    tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "step", replace(GRIFFIN, **change))
    capsys.readouterr()
    assert export(folder, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_a_training_run_is_exported(tmp_path: Path, dtype: str | None) -> None:
    """The newest step is exported: the model's arrays as stored, or rounded from the master weights."""
    config = config_json(GRIFFIN)
    for step in (100, 200):
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        values = make_checkpoint(
            folder, step=step, seed=step, dtype="bfloat16", tensors=model_tensors(GRIFFIN), config=config
        )
    assert export(tmp_path / "run", tmp_path / "out", *(["--dtype", dtype] if dtype else [])) == 0
    state = load_model(tmp_path / "out").state_dict()
    kind = "optimizer.master" if dtype == "fp32" else "model"
    found = state["model.layers.1.mlp_block.down_proj.weight"]
    assert np.array_equal(found.float().numpy(), values[f"{kind}.blocks.1.mlp.down.weight"].astype(np.float32))
    assert found.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)


def test_damaged_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "step", GRIFFIN)
    chunk = folder / "model.blocks.0.recurrent.out.weight/c.0.0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    capsys.readouterr()
    assert export(folder, tmp_path / "out") == 2
    assert str(chunk) in capsys.readouterr().err
    assert export(tmp_path / "absent", tmp_path / "out") == 2
    assert "absent does not exist" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize("size", ["0", "-1", "nan"])
def test_shard_size(tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path, tmp_path / "out", f"--shard-size={size}") == 2
    assert f"--shard-size {size}: must be above 0" in capsys.readouterr().err


# Auxiliary files


def make_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<unk>", "<eos>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def make_sentencepiece(folder: Path) -> Path:
    import sentencepiece

    (folder / "text").write_text("one two three four five six seven\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "pieces"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "pieces.model"


def trained(folder: Path, tokenizer: str) -> Path:
    """Make a checkpoint trained on data with this tokenizer."""
    text = folder / "text.jsonl"
    text.write_text(json.dumps({"text": "a b c"}) + "\n")
    prefix = folder / "data/train"
    assert main(["data", "build", str(prefix), str(text), "--tokenizer", tokenizer]) == 0
    config = config_json(GRIFFIN)
    config["data"]["train"] = [f"1.0 {prefix}"]
    make_checkpoint(folder / "step", tensors=model_tensors(GRIFFIN), weights_only=True, config=config)
    return folder / "step"


def ids_of(folder: Path) -> list[Any]:
    config = json.loads((folder / "config.json").read_text())
    return [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]


def test_tokenizer_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is exported while it exists unchanged."""
    from transformers import AutoTokenizer

    path = make_tokenizer(tmp_path / "mine.json")
    step = trained(tmp_path, str(path))
    capsys.readouterr()
    assert export(step, tmp_path / "out") == 0
    assert f"tokenizer files: tokenizer.json ({path}), tokenizer_config.json" in capsys.readouterr().out
    assert (tmp_path / "out/tokenizer.json").read_bytes() == path.read_bytes()
    assert ids_of(tmp_path / "out") == [None, 1, None]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("c a b")["input_ids"] == [4, 2, 3]
    assert tokenizer.eos_token_id == 1
    assert load_model(tmp_path / "out").config.pad_token_id is None
    path.write_text(path.read_text().replace('"c"', '"d"'))
    assert export(step, tmp_path / "other") == 0
    assert f"no tokenizer: {path} is not the tokenizer that" in capsys.readouterr().out
    assert ids_of(tmp_path / "other") == [None, 1, None]
    (tmp_path / "data/train.json").unlink()
    assert export(step, tmp_path / "none") == 0
    assert "no tokenizer: data prefix" in capsys.readouterr().out
    assert ids_of(tmp_path / "none") == [None, None, None]
    assert not list((tmp_path / "none").glob("tokenizer*"))


def test_the_copy_in_the_run_folder_where_the_data_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tokenizer(tmp_path / "mine.json")
    content, step, run = path.read_bytes(), trained(tmp_path, str(path)), RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    step.rename(run.checkpoints / "step-00000001")
    assert copy_tokenizer(run, [f"1.0 {tmp_path / 'data/train'}"]) is None
    path.unlink()
    (tmp_path / "data/train.json").unlink()
    capsys.readouterr()
    assert export(run.path, tmp_path / "out") == 0
    copy = run.tokenizer / "tokenizer.json"
    assert f"tokenizer files: tokenizer.json ({copy}), tokenizer_config.json" in capsys.readouterr().out
    assert (tmp_path / "out/tokenizer.json").read_bytes() == content
    assert ids_of(tmp_path / "out") == [None, 1, None]


def test_bytes_have_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(trained(tmp_path, "bytes"), tmp_path / "out") == 0
    assert "no tokenizer: the model was trained on bytes" in capsys.readouterr().out
    assert ids_of(tmp_path / "out") == [None, 256, None]


def test_sentencepiece_model_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_sentencepiece(tmp_path)
    assert export(trained(tmp_path, str(path)), tmp_path / "out") == 0
    assert f"tokenizer files: tokenizer.model ({path})" in capsys.readouterr().out
    assert (tmp_path / "out/tokenizer.model").read_bytes() == path.read_bytes()
    assert ids_of(tmp_path / "out") == [None, 1, None]


@pytest.mark.parametrize("as_folder", [False, True])
def test_deepminds_tokenizer_goes_along(tmp_path: Path, as_folder: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The exported model takes the token ids of the SentencePiece model."""
    path = make_sentencepiece(tmp_path)
    if as_folder:
        (tmp_path / "folder").mkdir()
        path = path.rename(tmp_path / "folder/tokenizer.model")
    source = plain(make_model(num_hidden_layers=1), tmp_path / "weights.pt")
    tokenizer = path.parent if as_folder else path
    assert convert("deepmind", source, tmp_path / "step", "--tokenizer", tokenizer) == 0
    assert "tokenizer files: tokenizer.model" in capsys.readouterr().out
    assert (tmp_path / "step/source/tokenizer.model").read_bytes() == path.read_bytes()
    assert export(tmp_path / "step", tmp_path / "out") == 0
    assert (tmp_path / "out/tokenizer.model").read_bytes() == path.read_bytes()
    assert ids_of(tmp_path / "out") == [2, 1, 0]


def test_config_is_kept_beside_the_models_settings(tmp_path: Path) -> None:
    """Token ids and other keys are kept, except for other names of the model's settings."""
    source = save_model(make_model(num_hidden_layers=1), tmp_path / "model")
    changes = {
        "eos_token_id": [1, 107],
        "bos_token_id": 7,
        "custom": {"a": 1},
        "_block_types": ["attention"],
        "torch_dtype": "float16",
        "sliding_window": 12,
    }
    change_json(source / "config.json", **changes)
    make_tokenizer(source / "tokenizer.json")
    assert convert("hf", source, tmp_path / "step") == 0
    assert reshard(tmp_path / "step", tmp_path / "bf16", "--weights-only", "--dtype", "bf16") == 0
    assert export(tmp_path / "bf16", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert ids_of(tmp_path / "out") == [7, [1, 107], 0]
    assert config["custom"] == {"a": 1}
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["attention_window_size"] == 12
    assert "sliding_window" not in config
    assert "_block_types" not in config
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_model(make_model(num_hidden_layers=1), tmp_path / "model")
    make_tokenizer(source / "tokenizer.json")
    assert convert("hf", source, tmp_path / "step") == 0
    other = tmp_path / "other"
    other.mkdir()
    capsys.readouterr()
    for folder in (other, tmp_path / "absent"):
        assert export(tmp_path / "step", tmp_path / "out", "--tokenizer", folder) == 2
        assert f"--tokenizer {folder}: must be a folder with one of tokenizer.json" in capsys.readouterr().err
    (other / "tokenizer.json").write_text("{}")
    (other / "config.json").write_text('{"eos_token_id": 9, "hidden_size": 5}')
    assert export(tmp_path / "step", tmp_path / "out", "--tokenizer", other) == 0
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out/generation_config.json").exists()
    assert ids_of(tmp_path / "out") == [None, 9, None]
    assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"] == 32

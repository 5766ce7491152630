"""Convert files with DeepMind's names, made here: the result is the checkpoint made from transformers."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from griffin.tools.cli import main
from griffin.tools.common import safetensors_files
from griffin.trainer.checkpoint import arrays
from griffin.trainer.checkpoint.manifest import read_manifest, verify
from tests.checkpoints import assert_equal_arrays, read_arrays, small_chunks
from tests.deepmind_models import flax_tree, numpy_of, plain, save_orbax, torch_state
from tests.transformers_models import assert_same_bits, convert, export, load_model, make_model, save_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def chunks() -> Iterator[None]:
    with small_chunks(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_files, "READ_BYTES", 300)
        yield


CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32, "num_attention_heads": 2, "head_dim": 24, "num_hidden_layers": 6},
    "hawk": {"dtype": torch.float32, "block_types": ["recurrent"], "num_hidden_layers": 2, "head_dim": 8},
    "attention": {
        "dtype": torch.bfloat16,
        "block_types": ["attention"],
        "num_hidden_layers": 2,
        "lru_width": 32,
    },
}


def unusual(model: Any, path: Path) -> Path:
    """Save parameters below "params", transposed in memory and in one storage, as DeepMind's conversion may do."""
    state = torch_state(model)
    for name, value in state.items():
        if value.dim() == 2:
            state[name] = value.t().contiguous().t()
    pair = torch.stack([state["blocks.0.temporal_pre_norm.scale"], state["blocks.0.channel_pre_norm.scale"]])
    state["blocks.0.temporal_pre_norm.scale"], state["blocks.0.channel_pre_norm.scale"] = pair
    torch.save({f"params.{name}": torch.nn.Parameter(value) for name, value in state.items()}, path)
    return path


def repacked_unusual(model: Any, path: Path) -> Path:
    """Repack the archive with another program: torch computes the offsets of its own records."""
    repacked(unusual(model, path))
    return path


def negated(model: Any, path: Path) -> Path:
    """Save strided views with the negative bit, whose signs are flipped on reading."""
    state = torch_state(model)
    for name, value in state.items():
        doubled = torch.stack([-value, value], dim=-1)
        state[name] = torch._neg_view(doubled[..., 0])
    torch.save(state, path)
    return path


SAVED: dict[str, Callable[[Any, Path], Path]] = {
    "torch": plain,
    "torch-transposed": unusual,
    "torch-repacked": repacked_unusual,
    "torch-views": negated,
    "orbax": lambda model, path: save_orbax({"params": flax_tree(model)}, path),
    "orbax-bare": lambda model, path: save_orbax(flax_tree(model), path),
}


@pytest.mark.parametrize(
    ("how", "case"),
    [
        pytest.param(how, case, marks=[] if case == "bfloat16" else pytest.mark.slow)
        for how in ("torch", "orbax")
        for case in CASES
    ]
    + [
        pytest.param(how, "bfloat16", marks=pytest.mark.slow)
        for how in ("torch-transposed", "torch-repacked", "torch-views", "orbax-bare")
    ],
)
def test_the_same_checkpoint(tmp_path: Path, how: str, case: str) -> None:
    """The checkpoint is bitwise that made from transformers, with a window one larger than DeepMind's."""
    model = make_model(**CASES[case])
    assert convert("hf", save_model(model, tmp_path / "model"), tmp_path / "expected") == 0
    source = SAVED[how](model, tmp_path / "weights.pt")
    assert convert("deepmind", source, tmp_path / "step", "--window", 11) == 0
    assert_equal_arrays(read_arrays(tmp_path / "step"), read_arrays(tmp_path / "expected"))
    found, expected = verify(tmp_path / "step"), read_manifest(tmp_path / "expected")
    assert found.config == expected.config
    assert found.config["model"]["window"] == 12
    assert found.arrays == expected.arrays
    assert found.sources == (str(source),)


def test_padded_rows_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(torch.bfloat16, num_hidden_layers=1)
    for rows, words, vocabulary in (
        (200, [], 200),
        (200, ["--vocabulary", 150], 150),
        (256_128, [], 256_000),
        (256_128, ["--vocabulary", 256_128], 256_128),
    ):
        state = torch_state(model)
        state["embedder.input_embedding"] = torch.randn(rows, 32).to(torch.bfloat16)
        torch.save(state, tmp_path / "weights.pt")
        target = tmp_path / f"{rows}-{vocabulary}"
        with pytest.MonkeyPatch.context() as patch:  # else there are thousands of chunks
            patch.setattr(arrays, "WHOLE_BYTES", 2**25)
            assert convert("deepmind", tmp_path / "weights.pt", target, *words) == 0
        assert read_manifest(target).config["model"]["vocabulary"] == vocabulary
        found = read_arrays(target)["model.embedding.weight"]
        assert found.tobytes() == numpy_of(state["embedder.input_embedding"][:vocabulary]).tobytes()
    torch.save(torch_state(model), tmp_path / "weights.pt")
    capsys.readouterr()
    assert convert("deepmind", tmp_path / "weights.pt", tmp_path / "out", "--vocabulary", 201) == 2
    assert "--vocabulary 201: must be 1 to 200" in refused(capsys, tmp_path)


def refused(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    error = capsys.readouterr().err
    assert error.startswith("griffin: error: ")
    assert error.count("\n") == 1
    assert not list(folder.glob("out*"))
    return error


def test_options(tmp_path: Path) -> None:
    source = plain(make_model(num_hidden_layers=1), tmp_path / "weights.pt")
    words = ["--soft-cap", 0, "--no-scale-embedding", "--dtype", "bf16"]
    assert convert("deepmind", source, tmp_path / "step", *words) == 0
    manifest = read_manifest(tmp_path / "step")
    model = manifest.config["model"]
    assert (model["logit_soft_cap"], model["scale_embedding"], model["window"]) == (0.0, False, 2049)
    assert {spec.dtype for spec in manifest.arrays.values()} == {"bfloat16"}


@pytest.mark.slow
def test_several_workers(tmp_path: Path) -> None:
    model = make_model(torch.bfloat16)
    source = plain(model, tmp_path / "weights.pt")
    assert convert("deepmind", source, tmp_path / "step", "--window", 11, workers=2) == 0
    assert export(tmp_path / "step", tmp_path / "back") == 0
    assert_same_bits(load_model(tmp_path / "back").state_dict(), model.state_dict())


EVIL: list[str] = []


class Evil:
    def __reduce__(self) -> Any:
        return EVIL.append, ("run",)


BLOCK = "blocks.0.recurrent_block"


def nested(path: Path) -> None:
    torch.save({"model": torch.load(path)}, path)


def evil(path: Path) -> None:
    torch.save({**torch.load(path), "other": Evil()}, path)


def changed(**changes: Any) -> Callable[[Path], None]:
    """Return a function that changes tensors of a file; None removes one."""

    def change(path: Path) -> None:
        state = torch.load(path)
        for name, value in changes.items():
            if value is None:
                del state[name]
            else:
                state[name] = value(state.get(name))
        torch.save(state, path)

    return change


def repacked(path: Path, compression: int = zipfile.ZIP_STORED, cut: int = 0) -> None:
    """Repack the archive, which moves its records, and cut `cut` bytes off the largest."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    largest = max(records, key=lambda name: len(records[name]))
    records[largest] = records[largest][: len(records[largest]) - cut]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def short_record(path: Path) -> None:
    repacked(path, cut=100)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "evil": (evil, "holds more than tensors, or is damaged; pickled code is never run"),
    "no zip": (lambda path: path.write_bytes(b"\x80\x02" * 100), "is not a file of torch.save, is older than"),
    "legacy": (
        lambda path: torch.save(torch.load(path), path, _use_new_zipfile_serialization=False),
        "is not a file of torch.save, is older than PyTorch 1.6, or is cut short",
    ),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "or is cut short"),
    "compressed": (lambda path: repacked(path, zipfile.ZIP_DEFLATED), "is compressed; must be as torch.save writes"),
    "short record": (short_record, "is damaged: its records are not as large as its tensors"),
    "no values": (
        changed(**{"final_norm.scale": lambda value: torch.empty(32, device="meta")}),
        "final_norm.scale must be a dense tensor",
    ),
    "sparse": (changed(**{"final_norm.scale": lambda value: value.to_sparse()}), "must be a dense tensor"),
    "nested": (nested, "must hold tensors by name only; 'model' is a dict"),
    "list": (lambda path: torch.save([torch.ones(1)], path), "must hold a dictionary of tensors"),
    "llama": (
        lambda path: torch.save({"model.embed_tokens.weight": torch.ones(2, 2)}, path),
        "embedder.input_embedding is missing: these are not the weights of RecurrentGemma",
    ),
    "missing": (changed(**{f"{BLOCK}.linear_x.bias": None}), f"{BLOCK}.linear_x.bias is missing"),
    "no gate": (changed(**{f"{BLOCK}.rg_lru.a_gate.w": None}), f"{BLOCK}.rg_lru.a_gate.w is missing"),
    "unknown": (changed(other=lambda value: torch.ones(1)), "other is not a tensor of this model"),
    "shape": (
        changed(**{f"{BLOCK}.conv_1d.w": lambda value: value.t().contiguous()}),
        f"{BLOCK}.conv_1d.w is [48, 4], must be [4, 48]",
    ),
    "dimensions": (
        changed(**{"embedder.input_embedding": lambda value: value.flatten()}),
        "embedder.input_embedding is [6400], must have 2 dimensions",
    ),
    "float64": (changed(**{"final_norm.scale": lambda value: value.double()}), "final_norm.scale is of dtype float64"),
    "block": (
        changed(**{"blocks.7.recurrent_block.linear_x.bias": lambda value: torch.ones(1)}),
        "blocks.2 has no recurrent_block and no attention_block",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_wrong_files(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = plain(make_model(num_hidden_layers=2), tmp_path / "weights.pt")
    damage, message = DAMAGED[case]
    damage(source)
    assert convert("deepmind", source, tmp_path / "out") == 2
    error = refused(capsys, tmp_path)
    assert message in error
    assert str(source) in error
    assert not EVIL


def test_wrong_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tree = flax_tree(make_model(num_hidden_layers=1))
    del tree["blocks.0"]["recurrent_block"]["linear_x"]["bias"]
    source = save_orbax(tree, tmp_path / "weights")
    assert convert("deepmind", source, tmp_path / "out") == 2
    assert f"{source}: {BLOCK}.linear_x.bias is missing" in refused(capsys, tmp_path)
    assert convert("deepmind", source, tmp_path / "out", workers=2) == 2
    assert "--workers 2: must be 1 for an orbax folder" in refused(capsys, tmp_path)
    (tmp_path / "empty").mkdir()
    assert convert("deepmind", tmp_path / "empty", tmp_path / "out") == 2
    assert f"{tmp_path / 'empty'}: orbax finds no parameters" in refused(capsys, tmp_path)
    assert convert("deepmind", tmp_path / "absent", tmp_path / "out") == 2
    assert "absent: must be a file of torch.save, or an orbax folder" in refused(capsys, tmp_path)
    tree = flax_tree(make_model(num_hidden_layers=1))
    for other, name in (([np.ones(3, np.float32)], "opt.0"), ({"step": 3}, "opt.step")):
        source = save_orbax({"params": tree, "opt": other}, tmp_path / f"more{name}")
        assert convert("deepmind", source, tmp_path / "out") == 2
        assert f"{name} is not a tensor of this model" in refused(capsys, tmp_path)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    assert convert("deepmind", source, tmp_path / "out") == 2
    assert "which orbax-checkpoint reads; pip install 'griffin-megatron[orbax]'" in refused(capsys, tmp_path)


@pytest.mark.slow
def test_damaged_folders(tmp_path: Path) -> None:
    """In a separate process, since orbax leaves unretrieved exceptions in its tasks."""
    source = save_orbax(flax_tree(make_model(num_hidden_layers=1)), tmp_path / "weights")
    for path in source.rglob("ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = [sys.executable, "-m", "griffin.tools.cli", "convert", "deepmind", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert re.search(rf"^griffin: error: {source}: \S+ cannot be read: ", done.stderr, re.MULTILINE), done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window", 0], "--window 0: must be at least 1"),
        (["--soft-cap", -1], "--soft-cap -1: must be 0 (off) or more"),
        (["--soft-cap", "nan"], "--soft-cap nan: must be 0 (off) or more"),
        (["--vocabulary", 0], "--vocabulary 0: must be 1 to 200"),
        (["--tokenizer", "/absent"], "--tokenizer /absent: must be a SentencePiece model (.model)"),
    ],
)
def test_wrong_options(tmp_path: Path, words: list[object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = plain(make_model(num_hidden_layers=1), tmp_path / "weights.pt")
    assert convert("deepmind", source, tmp_path / "out", *words) == 2
    assert message in refused(capsys, tmp_path)


def test_help_says_what_the_window_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "deepmind", "--help"])
    assert "model.window becomes W + 1" in " ".join(capsys.readouterr().out.split())

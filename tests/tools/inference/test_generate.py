"""Generation from checkpoints: the same tokens as transformers; the commands `generate` and `logits`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from griffin.tools.cli import main
from griffin.tools.commands import logits as logits_module
from griffin.tools.inference.model import InferenceCheckpoint, LoadedModel, open_model
from griffin.tools.inference.sampling import Sampling, generate
from griffin.trainer.checkpoint.manifest import check
from griffin.trainer.settings.complete import load_config
from tests.ranks import RankPool
from tests.small_runs import CONFIG, launch, wait_for
from tests.transformers_models import convert, load_model, make_model, save_model, tokens

BEYOND = 64  # tokens past the window


def open_checkpoint(folder: Path, tensor: int = 1) -> InferenceCheckpoint:
    return InferenceCheckpoint(folder, check(folder), tensor, "float32")


def answers(ranks: Any, checkpoint: InferenceCheckpoint, prompts: list[list[int]], count: int) -> list[list[int]]:
    with open_model(checkpoint, ranks) as model:
        return generate(model, prompts, max_tokens=count, sampling=Sampling())


def converted(folder: Path, *, embedding: float = 1.0, **changes: Any) -> tuple[Path, Any]:
    """A checkpoint and its transformers model, without end-of-sequence and padding tokens."""
    model = make_model(eos_token_id=None, pad_token_id=None, bos_token_id=None, **changes)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(embedding)
    assert convert("hf", save_model(model, folder / "model"), folder / "step") == 0
    return folder / "step", model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_window_size": 5, "num_attention_heads": 2, "head_dim": 24},
        {"attention_window_size": 33, "num_hidden_layers": 7, "lru_width": 32},
        {"attention_window_size": 16, "num_attention_heads": 8, "head_dim": 4, "lru_width": 64, "hidden_size": 64,
         "intermediate_size": 384},
    ],
    ids=["R-48", "two-heads", "seven-blocks", "eight-heads"],
)  # fmt: skip
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Prompts are shorter and longer than the window; we run them as one batch, transformers one by one."""
    # Small embeddings: with large ones, each token would be followed by itself.
    folder, model = converted(tmp_path, embedding=0.05, **changes)
    window = model.config.attention_window_size
    count = window + BEYOND
    prompts = [tokens(length=length, batch=1)[0].tolist() for length in (2, 4, window, window + 9)]
    found = answers(None, open_checkpoint(folder), prompts, count)
    for prompt, answer in zip(prompts, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, use_cache=True)
        assert answer == expected[0, len(prompt) :].tolist()
        assert len(set(answer)) > 8, "says nothing"


def test_two_tensor_ranks_generate_the_same(tmp_path: Path, rank_pool: RankPool) -> None:
    folder, _ = converted(tmp_path, embedding=0.05)
    prompts = [tokens(length=length, batch=1)[0].tolist() for length in (1, 3, 20)]
    expected = answers(None, open_checkpoint(folder), prompts, 80)
    assert rank_pool.run(answers, 2, open_checkpoint(folder, tensor=2), prompts, 80) == [expected] * 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose tokenizer has one token per byte, and special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel

    folder = tmp_path_factory.mktemp("generate")
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<turn>": 3} | {name: n + 4 for n, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<turn>"])
    model = make_model(vocab_size=300, eos_token_id=1, pad_token_id=0, bos_token_id=2)  # more than the tokenizer has
    source = save_model(model, folder / "model")
    tokenizer.save(str(source / "tokenizer.json"))
    assert convert("hf", source, folder / "step") == 0
    return folder / "step"


def run(*words: object) -> int:
    return main(["generate", *map(str, words)])


def test_a_prompt_is_continued(checkpoint: Path, capfd: pytest.CaptureFixture) -> None:
    assert run(checkpoint, "--prompt", "hello", "--max-tokens", 30) == 0
    text, said = capfd.readouterr()
    assert text.endswith("\n")
    assert "30 tokens in" in said
    model = load_model(checkpoint.parent / "model")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.parent / "model" / "tokenizer.json"))
    prompt = torch.tensor([[2, *tokenizer.encode("hello").ids]])
    expected = model.generate(prompt, max_new_tokens=30, do_sample=False)[0, prompt.shape[1] :].tolist()
    known = [token for token in expected if token < tokenizer.get_vocab_size()]
    assert text == tokenizer.decode(known, skip_special_tokens=False) + "\n"


def test_a_batch_in_the_order_of_its_file(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    texts = ["a", "longer than the others", "three words here", "<turn>x"]
    (tmp_path / "plain.txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8-sig")
    (tmp_path / "objects.jsonl").write_text("\n".join(json.dumps({"prompt": text, "id": 1}) for text in texts))
    drawn = ("--temperature", 0.8, "--top-k", 40, "--top-p", 0.9, "--seed", 5, "--max-tokens", 10)
    found = []
    for file, size in (("plain.txt", 16), ("objects.jsonl", 2)):
        assert run(checkpoint, "--batch", tmp_path / file, "--batch-size", size, *drawn) == 0
        found.append([json.loads(line) for line in capfd.readouterr().out.splitlines()])
    assert found[0] == found[1]
    assert [line["prompt"] for line in found[0]] == texts
    assert [line["prompt_tokens"] for line in found[0]] == [2, 23, 17, 3], "<turn> is one token"
    assert all(line["tokens"] == 10 or line["stopped"] for line in found[0])
    assert run(checkpoint, "--batch", tmp_path / "plain.txt", *drawn, "--no-bos") == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["prompt_tokens"] for line in lines] == [1, 22, 16, 2]


@pytest.mark.slow
def test_on_two_ranks_of_this_machine(checkpoint: Path, capfd: pytest.CaptureFixture) -> None:
    arguments = [str(checkpoint), "--prompt", "hello", "--max-tokens", "20", "--temperature", "1", "--top-k", "20"]
    assert run(*arguments) == 0
    expected = capfd.readouterr().out
    command = [sys.executable, "-m", "griffin.tools.cli", "generate", *arguments, "--tensor", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == expected


@pytest.mark.slow
def test_compiled(checkpoint: Path, tmp_path: Path) -> None:
    """The answers are the same for prompts of equal and different lengths, beyond the window."""
    (tmp_path / "unlike.txt").write_text("one\ntwo words\nx\n")
    arguments = ["--batch", str(tmp_path / "unlike.txt"), "--max-tokens", "30", "--temperature", "1", "--top-k", "20"]
    command = [sys.executable, "-m", "griffin.tools.cli", "generate", str(checkpoint), *arguments]
    for batch_size in ("1", "3"):
        outputs = [
            subprocess.run(
                [*command, "--batch-size", batch_size, *words], capture_output=True, text=True, timeout=300, check=True
            ).stdout
            for words in ([], ["--compile"])
        ]
        assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compile", "--tensor", "2"], "--compile: must be left out with --tensor 2"),
        (["--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
        (["--batch-size", "-1"], "--batch-size -1: must be at least 1"),
        (["--top-p", "2"], "--top-p 2.0: must be above 0 and at most 1"),
        (["--tensor", "0"], "--tensor 0: must be at least 1"),
        (["--tensor", "3"], "--tensor 3: must divide the"),
        (["--tokenizer", "none.json"], "tokenizer 'none.json': no such file"),
    ],
)
def test_invalid_arguments(checkpoint: Path, words: list[str], said: str, capfd: pytest.CaptureFixture) -> None:
    assert run(checkpoint, "--prompt", "x", *words) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "none.txt: No such file"),
        ("empty.txt", b"\n \n", "empty.txt: holds no prompt"),
        ("latin.txt", b"\xe9\n", "latin.txt: must be UTF-8"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', 'bad.jsonl, line 2: must be a JSON object with a string'),
        ("bad.jsonl", b"[]\n", "bad.jsonl, line 1: must be"),
        ("BAD.JSONL", b"[" * 100_000, "BAD.JSONL, line 1: must be"),
        ("lone.jsonl", b'{"prompt": "ok"}\n{"prompt": "a\\ud800"}', "lone.jsonl, line 2: must be text that UTF-8"),
    ],
)  # fmt: skip
def test_damaged_batches(
    checkpoint: Path, tmp_path: Path, name: str, content: bytes | None, said: str, capfd: pytest.CaptureFixture
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(checkpoint, "--batch", tmp_path / name) == 2
    assert said in capfd.readouterr().err


def test_compilation_needs_a_compiler(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run(checkpoint, "--prompt", "x", "--compile") == 2
    assert "--compile: needs a C++ compiler on CPUs; found no no-such-compiler" in capfd.readouterr().err


def test_a_folder_that_is_not_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "none", "--prompt", "x") == 2
    assert f"{tmp_path / 'none'} does not exist" in capfd.readouterr().err


def test_a_model_without_a_tokenizer(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder, _ = converted(tmp_path)
    assert run(folder, "--prompt", "x") == 2
    assert "has no tokenizer; name one with --tokenizer FILE" in capfd.readouterr().err
    assert run(folder, "--prompt", "\x01", "--tokenizer", "bytes", "--max-tokens", 3) == 0
    assert run(folder, "--prompt", "", "--tokenizer", "bytes") == 2
    assert "must have at least one token" in capfd.readouterr().err
    assert run(folder, "--prompt", "\U00010000", "--tokenizer", "bytes") == 2
    assert (
        "--prompt: has token 240 of tokenizer bytes; must be below 200, the model's vocabulary"
        in capfd.readouterr().err
    )


def logits(*words: object) -> int:
    return main(["logits", *map(str, words)])


def test_logits_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = converted(tmp_path)
    ids = tokens(length=40, batch=3)
    np.save(tmp_path / "tokens.npy", ids.numpy().astype(np.uint16))
    assert logits(folder, "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "one.npy") == 0
    one = np.load(tmp_path / "one.npy")
    assert (one.dtype, one.shape) == (np.float32, (3, 40, 200))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert expected.abs().max() > 5
    torch.testing.assert_close(torch.from_numpy(one), expected, rtol=0, atol=1e-4)
    assert logits(folder, "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "two.npy", "--tensor", 2) == 0
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), one, rtol=0, atol=1e-4)
    monkeypatch.setattr(logits_module, "SLICE_ELEMENTS", 7 * 200)  # seven positions at a time
    assert logits(folder, "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "cut.npy") == 0
    np.testing.assert_allclose(np.load(tmp_path / "cut.npy"), one, rtol=0, atol=1e-5)


def test_logits_refuse(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder, _ = converted(tmp_path)
    out = tmp_path / "out.npy"
    for content, said in (
        (np.zeros((2, 3), np.float32), "holds float32 [2, 3]; must be integers [B, T]"),
        (np.zeros(3, np.int64), "holds int64 [3]; must be integers [B, T]"),
        (np.zeros((2, 0), np.int64), "holds int64 [2, 0]; must be"),
        (np.full((1, 2), 200), "holds 200; the model's tokens are 0 to 199"),
        (np.full((1, 2), -1), "holds -1; the model's tokens"),
        (np.array([[{}]], dtype=object), "not a .npy file of numbers"),
    ):
        np.save(tmp_path / "tokens.npy", content, allow_pickle=True)
        assert logits(folder, "--tokens", tmp_path / "tokens.npy", "--out", out) == 2
        assert said in capfd.readouterr().err
    np.save(tmp_path / "tokens.npy", np.ones((1, 4), np.int64))
    assert logits(folder, "--tokens", tmp_path / "no.npy", "--out", out) == 2
    assert "no.npy: no such file" in capfd.readouterr().err
    assert logits(folder, "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "none" / "out.npy") == 2
    assert "must be in a folder that exists" in capfd.readouterr().err
    out.write_bytes(b"mine")
    assert logits(folder, "--tokens", tmp_path / "tokens.npy", "--out", out) == 2
    assert "exists, and is not overwritten" in capfd.readouterr().err
    assert out.read_bytes() == b"mine"


def logits_command(folder: Path, ids: Path, out: Path, *words: str) -> list[str]:
    command = [sys.executable, "-m", "griffin.tools.cli", "logits", str(folder), "--tokens", str(ids)]
    return [*command, "--out", str(out), *words]


def test_logits_leave_nothing_but_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = converted(tmp_path)
    ids = tmp_path / "out.npy.tmp"  # a name that is somebody else's
    with ids.open("wb") as file:
        np.save(file, np.ones((2, 4), np.int64))
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "out.npy"
    before = ids.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "all_gather_logits", fails)
        assert logits(folder, "--tokens", ids, "--out", out) == 2
    assert list(out.parent.iterdir()) == []

    def appears(*_: object) -> None:
        out.write_bytes(b"mine")

    with monkeypatch.context() as patch:
        patch.setattr(logits_module, "synchronise", appears)  # while it is made
        assert logits(folder, "--tokens", ids, "--out", out) == 2
    assert [(file, file.read_bytes()) for file in out.parent.iterdir()] == [(out, b"mine")]
    out.unlink()
    assert logits(folder, "--tokens", ids, "--out", out) == 0
    assert list(out.parent.iterdir()) == [out]
    assert ids.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_that_are_stopped_leave_nothing(tmp_path: Path, tensor: int) -> None:
    folder, _ = converted(tmp_path)
    np.save(tmp_path / "tokens.npy", np.ones((50_000, 40), np.int64))  # 1.6 GB of logits, of which few are made
    (tmp_path / "out").mkdir()
    command = logits_command(folder, tmp_path / "tokens.npy", tmp_path / "out" / "out.npy", "--tensor", str(tensor))
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: any(file.stat().st_size for file in (tmp_path / "out").iterdir()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.wait()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_trained_run(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Generate from a run folder with the tokenizer of its data, after the data were removed."""
    (tmp_path / "text.txt").write_text("the same words again and again\n" * 100)
    assert main(["data", "build", str(tmp_path / "data"), str(tmp_path / "text.txt"), "--tokenizer", "bytes"]) == 0
    config = tmp_path / "config.toml"
    config.write_text(
        CONFIG.format(folder=tmp_path).replace("/train", "/data").replace(f'eval = "{tmp_path}/eval"', "")
    )
    settings = ["--train.steps=30", "--checkpoint.interval=0", "--train.eval_interval=0"]
    assert launch(1, load_config(config, settings), tmp_path / "run") == 0
    (tmp_path / "data.bin").unlink()
    capfd.readouterr()
    assert run(tmp_path / "run", "--prompt", "the same wor", "--max-tokens", 8) == 0
    assert run(tmp_path / "run", "--prompt", "the same wor", "--max-tokens", 8, "--dtype", "bf16") == 0
    one, two = capfd.readouterr().out.splitlines()
    assert len(one) == len(two) == 8
    assert set(one) <= set("the same words again and again\n ")

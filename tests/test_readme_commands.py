"""Every command, config and piece of code of the README.md files runs as written, with stand-ins for what it reads."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import zarr

import griffin.launch.local
from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig
from griffin.tools.cli import COMMANDS, main
from griffin.tools.weights.imported import model_tensors
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.settings.complete import load_config
from tests.checkpoints import make_checkpoint
from tests.documents import READMES, ROOT, Block, blocks, name_of
from tests.small_steps import ARRAYS, bits, save_step

LANGUAGES = ("python", "sh", "text", "toml")


@cache
def commands() -> list[str]:
    """The command lines of all README.md files, without comments, continued lines as one."""
    texts = [block.text for document in READMES for block in blocks(document) if block.language == "sh"]
    lines = (line for text in texts for line in text.replace("\\\n", " ").splitlines())
    return [" ".join(code.split()) for code in (re.sub(r"(^|\s)#.*", "", line) for line in lines) if code.strip()]


# Stand-ins.

# Sixteen tensor ranks can share it.
MODEL = ModelConfig(
    pattern=(RECURRENT, ATTENTION),
    width=64,
    recurrent_width=64,
    heads=16,
    head_dim=4,
    gate_blocks=16,
    window=8,
    vocabulary=300,
    scale_embedding=True,
    logit_soft_cap=30.0,
)
TUNE = """
[data]
train = "data/books"
eval = "data/books-held-out"
sequence_length = 16
[parallel]
tensor = 2
[train]
global_batch = 256
"""
MY = f"""
[model]
pattern = {list(MODEL.pattern)}
width = 64
recurrent_width = 64
heads = 16
head_dim = 4
window = 8
scale_embedding = true
logit_soft_cap = 30
{TUNE}
"""


def make_tokenizer(path: Path) -> None:
    """Of as many tokens as the model has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel

    names = ["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<{number}>" for number in range(MODEL.vocabulary - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(path))


def make_sentencepiece(path: Path) -> None:
    import sentencepiece

    Path("text").write_text("one two three four five six seven\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input="text", model_prefix="pieces", vocab_size=40, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    Path("pieces.model").rename(path)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the README's commands read, under the names that they use."""
    import zstandard

    folder = tmp_path_factory.mktemp("stand-ins")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("books").mkdir()
        Path("books/one.txt").write_text("to be or not to be " * 20)
        lines = "".join(json.dumps({"text": f"text {number} " * 30}) + "\n" for number in range(400))
        Path("books/more.jsonl").write_text(lines)
        Path("more.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        make_tokenizer(Path("tokenizer.json"))
        data = ["data/books", "books", "more.jsonl.zst", "--tokenizer", "tokenizer.json", "--workers", "1"]
        assert main(["data", "build", *data, "--hold-out", "0.1", "--hold-out-prefix", "data/books-held-out"]) == 0
        for part in Path("data").glob("books.*"):
            shutil.copy(part, part.with_stem("code"))
        Path("my.toml").write_text(MY)
        Path("tune.toml").write_text(TUNE)

        config = load_config("my.toml")
        assert config.model == MODEL
        run = RunFolder.create(Path("runs/mine"), config, {})
        figures = {"loss": 2.5, "tokens": 1600, "tokens_per_second": 800.0, "trained_seconds": 2.0}
        run.metrics.write_text(json.dumps({"step": 100, "attempt": 1, "time": 0.0, **figures}) + "\n")
        step = run.checkpoints / "step-00000100"
        make_checkpoint(
            step,
            dtype="bfloat16",
            tensors=model_tensors(MODEL),
            config=json.loads(json.dumps(dataclasses.asdict(config))),
        )
        for name in ("SRC", "A", "B", "CHECKPOINT"):
            Path(name).symlink_to(step)
        Path("RUN").symlink_to("runs/mine")
        assert main(["export", "hf", "runs/mine", "recurrentgemma-2b", "--workers", "1"]) == 0
        assert main(["convert", "hf", "recurrentgemma-2b", "weights-2b", "--workers", "1"]) == 0
        Path("weights-9b").symlink_to("weights-2b")
        make_sentencepiece(Path("tokenizer.model"))
        Path("prompts.jsonl").write_text('{"prompt": "to be"}\n{"prompt": "or"}\n')
        np.save("tokens.npy", np.arange(3, 19).reshape(2, 8))
        Path("bin").mkdir()
        Path("bin/sbatch").write_text("#!/bin/sh\necho 17\n")
        Path("bin/sbatch").chmod(0o755)
    return folder


@pytest.fixture
def folder(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stand-ins as working folder, under no launcher, with an `sbatch` that takes any job."""
    shutil.copytree(stand_ins, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_ID", "SLURM_NTASKS", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


# Ways of running a command. Each takes its words.


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a `griffin` command, which is not run."""
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    for name in COMMANDS:
        importlib.import_module(f"griffin.tools.commands.{name}").add_parser(subparsers)
    assert words[0] == "griffin"
    return parser.parse_args(words[1:])


def run(words: list[str]) -> None:
    assert words[0] == "griffin"
    assert main(words[1:]) == 0


def run_with(*more: str) -> Callable[[list[str]], None]:
    """Run with these words more."""

    def way(words: list[str]) -> None:
        run([*words, *more])

    return way


one_worker = run_with("--workers", "1")
dry_run = run_with("--dry-run")


def build(words: list[str]) -> None:
    shutil.rmtree("data")
    one_worker(words)


def begin(words: list[str]) -> None:
    """A run of its own."""
    shutil.rmtree("runs")
    dry_run(words)


def convert(words: list[str]) -> None:
    """To a folder that the other commands read."""
    shutil.rmtree("weights-2b")
    one_worker(words)
    assert Path("weights-2b/manifest.json").is_file()


def convert_deepmind(words: list[str]) -> None:
    from safetensors.torch import load_file

    from tests.deepmind_models import flax_tree, plain, save_orbax

    layers = len(MODEL.pattern)
    (weights,) = Path("recurrentgemma-2b").glob("*.safetensors")
    model = SimpleNamespace(state_dict=lambda: load_file(weights), config=SimpleNamespace(num_hidden_layers=layers))
    if words[3].endswith("/"):
        save_orbax({"params": flax_tree(model)}, Path(words[3]).absolute())
    else:
        plain(model, Path(words[3]))
    convert(words)


def torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words[1:])
    assert args.training_script == ".venv/bin/griffin"
    run(["griffin", *args.training_script_args, "--dry-run", "--ranks", args.nproc_per_node])


def mpiexec(words: list[str]) -> None:
    assert words[:2] == ["mpiexec", "-n"]
    run([*words[3:], "--dry-run", "--ranks", words[2]])


def srun(words: list[str]) -> None:
    assert words[:2] == ["srun", "--kill-on-bad-exit=1"]
    run([*words[2:], "--dry-run", "--ranks", "8"])


def launch_local(words: list[str]) -> None:
    """Up to where ranks are started."""
    with mock.patch.object(griffin.launch.local, "run_local", return_value=0) as start:
        run(words)
    assert start.call_args.args[1] == 8


def reshard_from_ranks(words: list[str]) -> None:
    run(["griffin", "checkpoint", "reshard", "A", "ranks", "--tensor", "2", "--rank-files", "--workers", "1"])
    Path("SRC").unlink()
    Path("ranks").rename("SRC")
    one_worker(words)


def parse_after_mpiexec(words: list[str]) -> None:
    assert words[:2] == ["mpiexec", "-n"]
    assert words[-1] == "..."
    parse([*words[3:-1], "SRC", "DST"])


def make(words: list[str]) -> None:
    words = [word for word in words if "=" not in word]
    assert words[0] == "make"
    subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True, timeout=60)


def one_test(words: list[str]) -> None:
    assert (ROOT / words[3]).is_file()
    assert words[4] == "-k"
    family, _, layout = words[5].partition("-")
    text = (ROOT / words[3]).read_text(encoding="utf-8") + (ROOT / "tests/layouts.py").read_text(encoding="utf-8")
    assert f'"{family}"' in text
    assert f'"{layout}"' in text


def tensorboard(words: list[str]) -> None:
    from tensorboard import program

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own packages
        board = program.TensorBoard()
        board.configure(words)
    assert board.flags.logdir == "runs"


def install(words: list[str]) -> None:
    assert words == shlex.split("python3 -m venv .venv && .venv/bin/pip install -e .")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    readmes = "".join(document.read_text(encoding="utf-8") for document in READMES)
    named = set(re.findall(r"(?:'\.|griffin-megatron)\[(\w+)\]", readmes))
    assert named
    assert named <= extras.keys()


slow = pytest.mark.slow
# What claims a command: a pattern for all of it, and the way.
RUN: list[tuple[str, Callable[[list[str]], None]]] = [
    (r"griffin data build .*", build),
    (r"griffin data (inspect|verify) .*", run),
    (r"griffin train (my\.toml|griffin-1.3b-8gpu) --ranks 8( .*)?", dry_run),
    (r"griffin train griffin-400m-1gpu .*", begin),
    (r"griffin train tune\.toml --init-from .*", dry_run),
    (r"torchrun .*", torchrun),
    (r"srun .*", srun),
    (r"mpiexec -n \d+ griffin train .*", mpiexec),
    (r"griffin launch slurm .*", run),
    (r"griffin launch local .*", launch_local),
    (r"griffin monitor .*", run_with("--once")),
    (r"griffin plot .*", run),
    (r"griffin convert hf .*", convert),
    (r"griffin convert deepmind 2b\.pt .*", convert_deepmind),
    (r"griffin export hf .*", one_worker),
    (r"griffin generate runs/mine .*", run_with("--max-tokens", "2")),
    (r"griffin model .*", run),
    (r"griffin checkpoint (list|inspect|verify) .*", run),
    (r"griffin checkpoint (diff|average) .*", one_worker),
    (r"griffin checkpoint reshard SRC DST (?!--from-ranks).*", one_worker),
    (r"griffin checkpoint reshard SRC DST --from-ranks", reshard_from_ranks),
    (r"griffin checkpoint plan .*", run),
]
# They start processes, or load JAX.
RUN_SLOWLY: list[tuple[str, Callable[[list[str]], None]]] = [
    (r"griffin convert deepmind 2b/ .*", convert_deepmind),
    (r"griffin generate weights-9b .* --tensor 2 .*", run),
    (r"griffin logits .* --tensor 2", run),
]
# They take minutes, need a GPU, look at the machine, serve without an end, or install.
PARSED: list[tuple[str, Callable[[list[str]], object]]] = [
    (r"(PYTEST_DEBUG_TEMPROOT=/tmp )?make .*", make),
    (r"\.venv/bin/python -m pytest .*", one_test),
    (r"python3 .*", install),
    (r"tensorboard .*", tensorboard),
    (r"griffin bench .*", parse),
    (r"griffin doctor", parse),
    (r"mpiexec -n \d+ griffin checkpoint reshard \.\.\.", parse_after_mpiexec),
]


def claims(command: str) -> list[Callable[[list[str]], object]]:
    return [way for pattern, way in [*RUN, *RUN_SLOWLY, *PARSED] if re.fullmatch(pattern, command)]


def parameters() -> Iterator[object]:
    slow_patterns = [pattern for pattern, _ in RUN_SLOWLY]
    for command in dict.fromkeys(commands()):
        is_slow = any(re.fullmatch(pattern, command) for pattern in slow_patterns)
        yield pytest.param(command, marks=[slow] if is_slow else [])


@pytest.mark.parametrize("command", list(parameters()))
def test_command(folder: Path, command: str) -> None:
    assert len(claims(command)) == 1, "must be claimed by one way of running it"
    claims(command)[0](shlex.split(command))


def test_each_way_is_of_use() -> None:
    for pattern, _ in [*RUN, *RUN_SLOWLY, *PARSED]:
        assert any(re.fullmatch(pattern, command) for command in commands()), pattern


def test_a_command_that_does_not_exist_is_refused() -> None:
    assert claims("griffin absent") == []
    with pytest.raises(SystemExit):
        parse(["griffin", "bench", "absent"])


def other_blocks() -> Iterator[object]:
    for document in READMES:
        for number, block in enumerate(blocks(document)):
            assert block.language in LANGUAGES, f"{name_of(document)}: a block of {block.language!r}"
            if block.language in ("python", "toml"):
                yield pytest.param(block, id=f"{name_of(document)}-{block.language}-{number}")


def imported_modules(code: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in names | {str(node.module) for node in nodes if hasattr(node, "module")}}


def assert_plain_installation_has(modules: set[str]) -> None:
    """Each module is Python's, this project's, or of a package that is installed with it, without any extra."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    required = {re.split(r"[^\w.-]", text)[0].replace("_", "-").lower() for text in dependencies}
    packages = packages_distributions()
    for module in modules - sys.stdlib_module_names - {"griffin"}:
        assert required & {name.replace("_", "-").lower() for name in packages[module]}, f"{module}: of no dependency"


def test_a_module_that_is_not_installed_is_seen() -> None:
    assert imported_modules("import a.b, c\nfrom d.e import f") == {"a", "c", "d"}
    with pytest.raises(AssertionError, match="transformers: of no dependency"):
        assert_plain_installation_has({"json", "zarr", "transformers"})


@pytest.mark.parametrize("block", list(other_blocks()))
def test_other_block(folder: Path, block: Block) -> None:
    if block.language == "toml":
        Path("block.toml").write_text(block.text)
        assert main(["train", "block.toml", "--ranks", "8", "--dry-run"]) == 0
        return
    values: dict[str, Any] = {
        **{name: torch.zeros(4, 1, 64) for name in ("x", "input_gate", "recurrence_gate", "branch", "a", "b")},
        "weight": torch.zeros(4, 64),
        "bias": torch.zeros(64),
        "decay": torch.zeros(64),
        "starts": torch.zeros(4, 1, dtype=torch.bool),
    }
    assert_plain_installation_has(imported_modules(block.text))
    exec(compile(block.text, name_of(block.document), "exec"), values)
    if "weight" in values and "group" in values:  # opening a checkpoint
        assert values["weight"].dtype == "bfloat16"
        assert values["weight"].shape == (MODEL.mlp_width, MODEL.width)
    if "read_array" in values:  # the checkpoint format's: it reads what stock Zarr does
        step = save_step(Path("checkpoints"), 1)
        arrays = {name: np.asarray(array[:]) for name, array in zarr.open_group(step, mode="r").arrays()}
        for name, array in arrays.items():
            assert np.array_equal(bits(values["read_array"](step, name)), bits(array)), name
        assert len(arrays) == len(ARRAYS)

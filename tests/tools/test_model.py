from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT
from griffin.parallel.world.grid import Grid, single_rank_grid
from griffin.tools.cli import main
from griffin.trainer.settings.load import CONFIGS
from griffin.trainer.settings.presets import PRESETS, preset
from griffin.trainer.summary import count_parameters, describe_pattern
from tests.data_sets import write_prefix

ROOT = Path(__file__).parents[2]

# Billions of parameters without the embedding, of Griffin, Hawk and the multi-query Transformer at every size
# (computed from arXiv 2402.19427, Table 2, with 16 gate blocks and a bias on every linear but q, k and v).
NON_EMBEDDING = {
    "100m": ("0.089", "0.094", "0.080"),
    "200m": ("0.163", "0.174", "0.142"),
    "400m": ("0.355", "0.375", "0.316"),
    "1.3b": ("1.24", "1.30", "1.12"),
    "3b": ("2.83", "3.00", "2.51"),
    "7b": ("6.79", "7.18", "5.94"),
    "14b": ("13.8", "14.8", "11.6"),
}
TOTAL = {"recurrentgemma-2b": 2_682_862_080, "recurrentgemma-9b": 8_579_977_216}


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    with single_rank_grid() as grid:
        yield grid


@pytest.mark.slow
def test_every_preset() -> None:
    """One run of the command prints the published sizes, within seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-m", "griffin.tools.cli", "model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, since the machine may be busy: 5 s measured, nearly all of it imports.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30

    header, *lines = result.stdout.splitlines()
    assert header.split()[:5] == ["preset", "width", "rec.", "heads", "blocks"]
    rows = {line.split()[0]: line.split(maxsplit=8) for line in lines}
    assert list(rows) == list(PRESETS)
    for name, (_, width, recurrent_width, heads, blocks, embedding, rest, total, pattern) in rows.items():
        model = PRESETS[name]
        assert [int(width), int(recurrent_width), int(heads), int(blocks)] == [
            model.width,
            model.recurrent_width,
            model.heads,
            model.blocks,
        ]
        counts = [int(count.replace(",", "")) for count in (embedding, rest, total)]
        assert counts[0] == 256_000 * model.width
        assert counts[0] + counts[1] == counts[2]
        assert pattern == describe_pattern(model.pattern)
        family, size = name.split("-")
        if name in TOTAL:
            assert counts[2] == TOTAL[name]
        else:
            published = NON_EMBEDDING[size][("griffin", "hawk", "mqa").index(family)]
            assert f"{counts[1] / 1e9:.{len(published.partition('.')[2])}f}" == published, name


def test_named_presets_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "hawk-100m", "recurrentgemma-2b"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "preset",
        "hawk-100m",
        "recurrentgemma-2b",
    ]


def test_unknown_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "hawk-100m", "grifin-7b"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "", "nothing is counted if one name is wrong"
    assert printed.err.startswith("griffin: error: model.preset = 'grifin-7b': no such preset; nearest: griffin-7b,")


CONFIG = """
[model]
pattern = ["recurrent", "attention"]
width = 64
recurrent_width = 64
heads = 2
head_dim = 16
[parallel]
tensor = 2
[data]
train = "absent"
sequence_length = 64
[train]
steps = 30
global_batch = 4
"""
# Without the embedding: 2 MLPs of 37,312, 5 norms of 64, a recurrence of 13,504 and an attention of 6,208 parameters.
SUMMARY = """small.toml
Model: 16,478,656 parameters, 16,384,000 of them embedding (vocabulary 256,000); 1 recurrent, 1 attention
2 ranks: tensor 2 x pipeline 1 x data 1; blocks per stage 2
Training: 30 steps of 4 sequences of 64 tokens: 120 sequences, 7,680 tokens
The data could not be read, which may change the vocabulary: """


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_config_whose_data_are_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "small.toml"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(SUMMARY)
    assert "absent" in printed.removeprefix(SUMMARY)


def test_config_whose_data_are_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Overrides are applied and the vocabulary is that of the data, as in a dry run of the training."""
    prefix = write_prefix(folder / "data", [[1] * 500], vocabulary=100)
    words = ["small.toml", "--data.train", prefix, "--train.steps=5", "--ranks", "4"]
    assert main(["model", *words]) == 0
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == "small.toml"
    assert lines == [
        "Model: 101,056 parameters, 6,400 of them embedding (vocabulary 100); 1 recurrent, 1 attention",
        "4 ranks: tensor 2 x pipeline 1 x data 2; blocks per stage 2",
        "Training: 5 steps of 4 sequences of 64 tokens: 20 sequences, 1,280 tokens",
    ]
    assert main(["train", *words, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert not (folder / "runs").exists()


def test_packaged_configs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "demo"]) == 0
    assert "4 ranks: tensor 2 x pipeline 2 x data 1; blocks" in capsys.readouterr().out
    assert not set(PRESETS) & {path.stem for path in CONFIGS.glob("*.toml")}, "a name stands for one thing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.toml"], "absent.toml: no such config file"),
        (["small.toml", "--model.gate_blocks", "7"], "model.gate_blocks = 7: must divide model.recurrent_width = 64"),
        (["small.toml", "--ranks", "3"], "world size = 3: must be a multiple of"),
        (["small.toml", "--ranks", "0"], "world size = 0: must be a multiple of"),
        (["small.toml", "hawk-100m", "--ranks", "2"], "--ranks 2: is for configs; hawk-100m is a preset"),
        (["hawk-100m", "--model.width", "64"], "--model.width: settings are for configs; hawk-100m is a preset"),
    ],
)
def test_refused(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["model", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"griffin: error: {message}")


def test_padding_of_the_vocabulary_is_not_counted(grid: Grid) -> None:
    model = preset("griffin-100m")
    embedding, rest = count_parameters(model, grid)
    assert count_parameters(replace(model, vocabulary=257), grid) == (257 * model.width, rest)
    assert embedding == 256_000 * model.width


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ((RECURRENT,), "1 recurrent"),
        ((GLOBAL_ATTENTION,) * 12, "12 global_attention"),
        ((RECURRENT, ATTENTION), "1 recurrent, 1 attention"),
        ((RECURRENT, RECURRENT, ATTENTION) * 4, "4 x (2 recurrent, 1 attention)"),
        ((RECURRENT, RECURRENT, ATTENTION) * 8 + (RECURRENT,) * 2, "8 x (2 recurrent, 1 attention), 2 recurrent"),
        ((RECURRENT, RECURRENT, ATTENTION, RECURRENT), "2 recurrent, 1 attention, 1 recurrent"),
        ((ATTENTION, RECURRENT) * 3 + (GLOBAL_ATTENTION,), "3 x (1 attention, 1 recurrent), 1 global_attention"),
        ((RECURRENT, ATTENTION, GLOBAL_ATTENTION), "1 recurrent, 1 attention, 1 global_attention"),
    ],
)
def test_describe_pattern(pattern: tuple[str, ...], text: str) -> None:
    assert describe_pattern(pattern) == text

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT
from griffin.parallel.grid import Grid, single_rank_grid
from griffin.tools.cli import main
from griffin.tools.model import count_parameters, describe_pattern
from griffin.trainer.presets import PRESETS, preset

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
    """One run of the command: its rows agree with the published sizes, within seconds."""
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
    # Processor time, since the machine may be busy: 5 s were seen, nearly all of it imports.
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

"""`griffin plot`: what of metrics.jsonl is a curve, and the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from griffin.tools.cli import main
from griffin.tools.commands.plot import SUFFIXES
from griffin.tools.common import plots
from griffin.tools.runs.curves import AXES, read_curves, thin
from griffin.tools.runs.plot import TITLES, label

LARGEST = 100_000  # bytes of an SVG of two panels, whatever the runs' lengths


def make_run(path: Path, *lines: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "config.toml").touch()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def long_run(path: Path, steps: int = 700) -> Path:
    return make_run(
        path,
        *(
            {
                "step": step,
                "attempt": 1,
                "time": 0.0,
                "loss": 5 / step,
                "tokens": 64 * step,
                "tokens_per_second": 100.0 + step % 7,
                "trained_seconds": 0.64 * step,
            }
            for step in range(1, steps + 1)
        ),
    )


def test_what_was_done_again_counts_once(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        {"step": 0, "eval_loss": 6.0, "eval_loss_tokens": 8},
        {"step": 10, "loss": 5.0, "tokens": 100},
        {"step": 20, "loss": 4.0, "tokens": 200},
        {"step": 15, "checkpoint_seconds": 1.0},  # written when it is on the disk
        {"step": 20, "eval_loss": 4.5, "eval_loss_tokens": 8},
        {"step": 30, "loss": 9.0, "tokens": 300},
        {"step": 30, "eval_loss": 9.5, "eval_loss_tokens": 8},
        {"step": 16, "loss": 3.5, "tokens": 160},  # after step 15
        {"step": 20, "loss": 3.0, "tokens": 200},
        {"step": 30, "loss": None, "tokens": 300},
        {"step": 40, "loss": 0.0, "loss_tokens": 0, "tokens": 400},
    )
    curves = read_curves(run, ["loss", "eval_loss", "checkpoint_seconds"])
    assert curves.figures["loss"].tolist() == [[10, 16, 20], [5.0, 3.5, 3.0]]
    assert curves.figures["eval_loss"].tolist() == [[0], [6.0]]
    assert curves.figures["checkpoint_seconds"].tolist() == [[15], [1.0]]
    assert curves.over("eval_loss", "tokens").tolist() == [[0], [6.0]]
    assert curves.over("checkpoint_seconds", "tokens").tolist() == [[150], [1.0]]
    assert curves.over("loss", "tokens").tolist() == [[100, 160, 200], [5.0, 3.5, 3.0]]
    assert curves.over("loss", "steps").tolist() == [[10, 16, 20], [5.0, 3.5, 3.0]]
    with pytest.raises(ValueError, match=r"--over seconds: .* has no figure trained_seconds"):
        curves.over("loss", "seconds")
    assert curves.others == {"eval_loss_tokens", "loss_tokens"}


def test_neighbours_are_averaged() -> None:
    points = np.array([range(10), range(0, 100, 10)], dtype=float)
    assert thin(points, 10) is points
    assert thin(points, 4).tolist() == [[1, 4, 6.5, 8.5], [10, 40, 65, 85]]


@pytest.mark.parametrize(
    ("figure", "title"),
    [
        ("loss", "loss (nats per token)"),
        ("eval_loss/books", "eval loss/books (nats per token)"),
        ("tokens_per_second", "tokens per second"),
        ("step_seconds", "step (s)"),
        ("memory_peak_gib", "memory peak (GiB)"),
        ("mfu", "mfu"),
        ("rglru/memory_p50/all", "rglru/memory p50/all"),
    ],
)
def test_titles_have_units(figure: str, title: str) -> None:
    assert label(figure) == title


def test_every_axis_has_a_title() -> None:
    assert TITLES.keys() == AXES.keys()


def test_svg(tmp_path: Path) -> None:
    runs = [str(long_run(tmp_path / name)) for name in ("griffin", "hawk", "other/hawk")]
    for name in ("one.svg", "two.svg"):
        assert main(["plot", *runs, "--out", str(tmp_path / name)]) == 0
    picture = (tmp_path / "one.svg").read_bytes()
    assert picture == (tmp_path / "two.svg").read_bytes()
    assert len(picture) < LARGEST
    drawn = picture.decode()  # with each text as a comment
    for text in ("loss (nats per token)", "tokens per second", "tokens", "griffin", runs[1], runs[2]):
        assert f"<!-- {text} -->" in drawn
    assert "fill: #ffffff" in drawn  # also on a dark page


def test_png_of_other_figures_and_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(long_run(tmp_path / "run", 30)), tmp_path / "run.png"
    words = ["--figures", "loss", "tokens", "--over", "steps", "seconds", "--points", "5"]
    assert main(["plot", run, "--out", str(out), *words]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{out}: loss, tokens of 1 run\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "--out", "run.pdf"], "--out run.pdf: must end in .svg or .png"),
        (["run", "--out", "kept.svg"], "--out kept.svg: exists already"),
        (["run", "--out", "nowhere/run.svg"], "--out nowhere/run.svg: nowhere must be a folder"),
        (["run", "--out", "run.svg", "--points", "1"], "--points 1: must be at least 2"),
        (["nowhere", "--out", "run.svg"], "nowhere: no such run folder"),
        ([".", "--out", "run.svg"], ".: not a run folder"),
        (["run", "--out", "run.svg", "--figures", "los"], "--figures los: no run has it; they have loss, mfu"),
        (["run", "--out", "run.svg", "--figures", "loss"], "--over tokens: run has no figure tokens"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", {"step": 1, "loss": 1.0, "mfu": 0.5})
    (tmp_path / "kept.svg").write_text("kept")
    assert main(["plot", *words]) == 2
    assert expected in capsys.readouterr().err
    assert (tmp_path / "kept.svg").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.svg", "run"]


def test_matplotlib_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs matplotlib; pip install 'griffin-megatron\[bench\]'"):
        plots.require_new_plot("--out", tmp_path / "run.svg", SUFFIXES)

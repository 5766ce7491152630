"""Whole runs: the content of the run folder, and refusals before anything is written."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from griffin.parallel.world.grid import single_rank_grid
from griffin.tools.cli import main
from griffin.trainer.checkpoint.manifest import verify
from griffin.trainer.checkpoint.steps import newest_complete
from griffin.trainer.reporting.charts import OTHERS, grouped
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config
from griffin.trainer.settings.validate import validate_data
from griffin.trainer.summary import summarize
from tests.ranks import RankPool
from tests.small_runs import metrics, run, write_config


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run_dir(rank_pool: RankPool, config_path: Path) -> Path:
    path = config_path.parent / "runs" / "tp2-dp2"
    rank_pool.run(run, 4, load_config(config_path, ["--parallel.tensor", "2"]), path)
    return path


def test_metrics(run_dir: Path) -> None:
    steps = [line for line in metrics(run_dir) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 4, 8, 12]
    for line in steps:
        assert {
            "step",
            "attempt",
            "loss",
            "grad_norm",
            "learning_rate",
            "tokens",
            "step_seconds",
            "tokens_per_second",
            "model_tflops_per_device",
        } <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        assert line["attempt"] == 1
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["step_seconds"])
    assert steps[0]["learning_rate"] == pytest.approx(5e-3)
    assert steps[-1]["learning_rate"] == pytest.approx(1e-3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    evaluations = [line for line in metrics(run_dir) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 5, 10, 12]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 1


def test_the_loss_of_a_layout_is_that_of_another(rank_pool: RankPool, config_path: Path, run_dir: Path) -> None:
    path = config_path.parent / "runs" / "pp2"
    rank_pool.run(run, 2, load_config(config_path, ["--parallel.pipeline", "2", "--train.steps", "12"]), path)
    for one, other in zip(metrics(run_dir), metrics(path), strict=True):
        for key in {"loss", "eval_loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5)  # float32 sums in another order


def test_environment_and_config(run_dir: Path, config_path: Path) -> None:
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["world_size"] == 4
    assert environment["layout"] == {
        "tensor": 2,
        "pipeline": 1,
        "virtual_pipeline": 1,
        "sequence_parallel": False,
        "data": 2,
    }
    assert environment["implementations"].keys() == {"optimizer", "attention", "kernels"}
    assert environment["implementations"]["attention"] in ("sdpa", "flex")
    assert environment["packages"]["megatron-core"] == "0.16.1"
    assert load_config(run_dir / "config.toml") == load_config(config_path, ["--parallel.tensor", "2"])


def summary(config: Config, world_size: int) -> str:
    with single_rank_grid() as grid:
        return summarize(config, world_size, grid)


def test_console_ends_with_where_to_look(run_dir: Path) -> None:
    text = (run_dir / "console.log").read_text()
    assert summary(load_config(run_dir / "config.toml"), 4) in text
    assert "4 ranks: tensor 2 x pipeline 1 x data 2; blocks per stage 3" in text
    first, last = (line["loss"] for line in metrics(run_dir) if line["step"] in (1, 12) and "loss" in line)
    assert f"training loss: {first:.3f} -> {last:.3f} nats per token" in text
    assert f"Run folder: {run_dir}" in text
    assert f"tensorboard --logdir {run_dir}/tensorboard\n" in text


def test_tensorboard_reads_the_same_back(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(RunFolder(run_dir).events))
    events.Reload()
    logged = {
        (line["step"], grouped(key)): value
        for line in metrics(run_dir)
        for key, value in line.items()
        if key not in ("step", "attempt", "time")
    }
    read = {(scalar.step, tag): scalar.value for tag in events.Tags()["scalars"] for scalar in events.Scalars(tag)}
    assert read.keys() == logged.keys()
    for key, value in logged.items():
        assert read[key] == pytest.approx(value, rel=1e-6)  # TensorBoard keeps float32


LOGGED = {
    "loss",
    "grad_norm",
    *(f"grad_norm/{kind}" for kind in ("recurrent", "attention", "mlp", "norm", "embedding")),
    "param_norm",
    "learning_rate",
    "tokens",
    "loss_tokens",
    "tokens_per_second",
    "model_tflops_per_device",
    "mfu",
    *(f"memory_{name}_gib" for name in ("allocated", "reserved", "peak")),
    *(f"{part}_seconds" for part in ("step", "forward_backward", "optimizer", "data_wait", "other")),
    "pipeline_bubble",
    "data_parallel_imbalance",
    "goodput",
    "trained_seconds",
    "restarts",
    "skipped_updates",
    "rewinds",
}
HEALTH = {
    f"rglru/{name}/{layer}"
    for name in (
        "decay_mean",
        *(f"{value}_{quantile}" for value in ("decay", "memory") for quantile in ("p05", "p50", "p95")),
        *(f"{gate}_gate_{end}" for gate in ("input", "recurrence") for end in ("closed", "open")),
    )
    for layer in ("all", "layer-00", "layer-02")
}


def tags_of(figures: set[str]) -> set[str]:
    return {grouped(figure) for figure in figures}


def test_every_figure_has_a_group_and_the_loss_the_first(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = sorted(EventAccumulator(str(RunFolder(run_dir).events)).Reload().Tags()["scalars"])
    assert tags[:2] == ["1_loss/eval_loss", "1_loss/loss"]
    assert {tag.split("/")[0] for tag in tags} == {
        "1_loss",
        "2_optimizer",
        "3_speed",
        "4_memory",
        "5_rglru",
        "6_run",
    }, f"what is in {OTHERS} has no group"


def test_every_figure_is_in_tensorboard_and_finite(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(RunFolder(run_dir).events)).Reload()
    saves = {"checkpoint_stall_seconds", "checkpoint_seconds", "checkpoint_bytes"}
    assert set(events.Tags()["scalars"]) == tags_of(LOGGED | HEALTH | saves | {"eval_loss", "eval_loss_tokens"})
    for tag in events.Tags()["scalars"]:
        assert all(math.isfinite(event.value) for event in events.Scalars(tag)), tag
    for tag in tags_of(LOGGED - {"trained_seconds"}):  # saves note that one too
        assert [event.step for event in events.Scalars(tag)] == [1, 4, 8, 12], tag
    for tag in tags_of(HEALTH):  # every 100 steps, at the first and at the last
        assert [event.step for event in events.Scalars(tag)] == [1, 12], tag
    assert set(events.Tags()["histograms"]) == {f"5_rglru/log2_memory/{layer}" for layer in ("layer-00", "layer-02")}


def test_the_first_page_of_charts_shows_what_is_logged(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = EventAccumulator(str(RunFolder(run_dir).events)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Run", "RG-LRU by layer"]
    tags = events.Tags()["scalars"]
    shown = set()
    for chart in (chart for category in layout.category for chart in category.chart):
        for pattern in chart.multiline.tag:
            found = {tag for tag in tags if re.match(pattern, tag)}  # as TensorBoard does
            assert found, f"{chart.title}: {pattern}"
            shown |= found
    # Of what is left out there is another form.
    missing = {"tokens", "loss_tokens", "model_tflops_per_device", "trained_seconds", "checkpoint_bytes"}
    assert tags_of(LOGGED | {"eval_loss"}) <= shown | tags_of(missing)


def test_parts_of_a_step_make_its_time(run_dir: Path) -> None:
    for line in (line for line in metrics(run_dir) if "loss" in line):
        parts = [line[f"{part}_seconds"] for part in ("forward_backward", "optimizer", "data_wait", "other")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(line["step_seconds"], rel=1e-6)
        assert line["forward_backward_seconds"] > line["step_seconds"] / 4
        assert line["pipeline_bubble"] == 0, "there is one stage"
        assert line["data_parallel_imbalance"] >= 1
        assert 0 < line["goodput"] < 1
        assert line["restarts"] == line["skipped_updates"] == line["rewinds"] == 0
        assert 0 < line["memory_allocated_gib"] <= line["memory_peak_gib"]


def test_checkpoint_at_the_end_of_the_run(run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "step-00000012"
    assert newest_complete(run_dir / "checkpoints") == (folder, [])
    saved = verify(folder)
    assert (saved.step, saved.samples, saved.attempt) == (12, 96, 1)
    assert saved.layout == json.loads((run_dir / "environment.json").read_text())["layout"]
    assert saved.config["train"]["steps"] == 12
    assert saved.config["model"]["pattern"] == ["recurrent", "attention", "recurrent"]
    assert f" MiB in {metrics(run_dir)[-1]['checkpoint_seconds']:.1f} s: {folder}\n" in (
        (run_dir / "console.log").read_text()
    )
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "attempts.jsonl",
        "checkpoints",
        "config.toml",
        "console.log",
        "environment.json",
        "metrics.jsonl",
        "stragglers.json",
        "tensorboard",
    ]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    """Ids outside the vocabulary, a damaged index, or invalid JSON."""
    path.write_bytes(b"\xff" * path.stat().st_size)


def test_an_export_that_will_be_impossible_is_said_at_the_start(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(config_path), "--run-dir", str(tmp_path / "run"), "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr().err
    for words in ("griffin export hf", "logit_soft_cap = 0: must be above 0", "scale_embedding = false: must be true"):
        assert words in said
    assert main([*command, "--model.logit_soft_cap=30", "--model.scale_embedding=true"]) == 0
    assert "export" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", [cut, empty, scribble, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("blend", ["train", "eval"])
def test_damaged_data_are_refused_before_anything_is_written(
    config_path: Path, tmp_path: Path, damage: Callable[[Path], None], suffix: str, blend: str
) -> None:
    for path in config_path.parent.glob(f"{blend}.*"):
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    damage(tmp_path / f"{blend}{suffix}")
    before = sorted(tmp_path.iterdir())
    config = load_config(config_path, [f"--data.{blend}", str(tmp_path / blend), "--model.vocabulary", "257"])
    with pytest.raises(ValueError, match=blend):
        validate_data(config)
    assert sorted(tmp_path.iterdir()) == before

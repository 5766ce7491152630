from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from griffin.trainer.metrics import MetricsWriter
from griffin.trainer.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "config.toml").write_text("[model]\nwidth = 32\n")
    return RunFolder(tmp_path)


def lines(folder: RunFolder) -> list[dict[str, float | None]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in folder.metrics.read_text().splitlines()]


def test_every_line_is_there_at_once(folder: RunFolder) -> None:
    with MetricsWriter(folder, tensorboard=False) as metrics:
        metrics.log(1, {"loss": 5.5, "tokens": 4096})
        assert lines(folder) == [{"step": 1, "loss": 5.5, "tokens": 4096}]
        metrics.log(2, {"eval_loss": 5.0})
    assert lines(folder)[1] == {"step": 2, "eval_loss": 5.0}
    assert not folder.tensorboard.exists()


def test_lines_are_appended(folder: RunFolder) -> None:
    for step in (1, 2):
        with MetricsWriter(folder, tensorboard=False) as metrics:
            metrics.log(step, {"loss": 1.0})
    assert [line["step"] for line in lines(folder)] == [1, 2]


def test_what_json_cannot_hold_is_null(folder: RunFolder) -> None:
    with MetricsWriter(folder, tensorboard=False) as metrics:
        metrics.log(1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 1})
    assert lines(folder) == [{"step": 1, "loss": None, "grad_norm": None, "tokens": 1}]


def test_tensorboard_has_the_same_and_the_config(folder: RunFolder) -> None:
    with MetricsWriter(folder, tensorboard=True) as metrics:
        metrics.log(1, {"loss": 5.5, "tokens": 4096})
        metrics.log(10, {"loss": 4.25, "tokens": 40960})
        events = EventAccumulator(str(folder.tensorboard)).Reload()  # flushed: a run that is killed keeps its figures
        assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.5), (10, 4.25)]
        assert [(event.step, event.value) for event in events.Scalars("tokens")] == [(1, 4096), (10, 40960)]
        (config,) = events.Tensors("config/text_summary")
        assert b"width = 32" in config.tensor_proto.string_val[0]

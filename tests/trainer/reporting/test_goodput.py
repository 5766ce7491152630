from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from griffin.trainer.reporting.goodput import Goodput
from griffin.trainer.run.folder import TIME_FORMAT, RunFolder
from griffin.trainer.settings.complete import load_config
from tests.ranks import RankPool
from tests.small_runs import metrics, run, series, write_config


def make_folder(path: Path, *, age: float, lines: list[dict[str, float]]) -> RunFolder:
    started = time.strftime(TIME_FORMAT, time.localtime(time.time() - age))
    (path / "environment.json").write_text(json.dumps({"started": started}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFolder(path, 2)


def test_lost_steps_do_not_count(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = [
        {"step": 10, "trained_seconds": 100.0},
        {"step": 20, "trained_seconds": 200.0},
        {"step": 20, "checkpoint_stall_seconds": 1.0, "trained_seconds": 200.0},
        {"step": 30, "trained_seconds": 300.0},  # lost: the next attempt goes on from step 20
    ]
    goodput = Goodput(make_folder(tmp_path, age=1000, lines=lines), 20)
    assert goodput.trained_seconds == 200.0
    assert goodput.values()["goodput"] == pytest.approx(0.2, rel=0.01)  # of the time since the first start
    time.sleep(0.02)
    goodput.resume()  # an evaluation, say
    assert goodput.trained_seconds == 200.0
    time.sleep(0.02)
    goodput.step()
    first = goodput.trained_seconds
    assert 200.02 <= first < 201
    goodput.saved(21)
    time.sleep(0.02)
    goodput.step(counts=False)
    assert goodput.trained_seconds == first
    time.sleep(0.02)
    goodput.step()
    assert goodput.trained_seconds > first
    goodput.rewind(21)
    assert goodput.trained_seconds == first
    goodput.rewind(20)
    assert goodput.trained_seconds == 200.0


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (5, 0.0), (10, 100.0), (15, 100.0)])
def test_the_count_goes_on_from_the_step(tmp_path: Path, step: int, expected: float) -> None:
    lines: list[dict[str, float]] = [{"step": 10, "trained_seconds": 100.0}, {"step": 16, "trained_seconds": 150.0}]
    assert Goodput(make_folder(tmp_path, age=1000, lines=lines), step).trained_seconds == expected


def test_goodput_without_a_start_time_counts_from_now(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{")
    assert Goodput(RunFolder(tmp_path), 0).values() == {"trained_seconds": 0.0, "goodput": pytest.approx(0.0, abs=1)}


def test_attempts_of_a_run_add_up(rank_pool: RankPool, tmp_path: Path) -> None:
    config_path, path = write_config(tmp_path), tmp_path / "run"
    for steps in (6, 12):
        rank_pool.run(run, 1, load_config(config_path, ["--train.steps", str(steps)]), path)
    trained = [(line["attempt"], line["trained_seconds"]) for line in metrics(path) if "trained_seconds" in line]
    seconds = [value for _, value in trained]
    assert seconds == sorted(seconds), "nothing was lost"
    last_of_first = max(value for attempt, value in trained if attempt == 1)
    first_of_second = min(value for attempt, value in trained if attempt == 2)
    assert 0 < first_of_second - last_of_first < 10
    assert series(path, "restarts") == {1: 0, 4: 0, 6: 0, 7: 1, 8: 1, 12: 1}
    assert all(0 < share < 1 for share in series(path, "goodput").values())

"""Stragglers: a planted slow rank is found, and equal ranks are not reported."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from griffin.parallel.stage import Stage
from griffin.parallel.world.axes import Axes
from griffin.parallel.world.ranks import Ranks
from griffin.trainer.data.dataset import Samples
from griffin.trainer.health.stragglers import Stragglers, Work
from griffin.trainer.loop import train
from griffin.trainer.settings.complete import load_config
from tests.ranks import RankPool
from tests.small_runs import metrics, write_config

SLEEP = 0.05  # seconds per micro-batch; its own work takes some thousandths


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("stragglers"))


def slow_run(ranks: Ranks, path: Path, run_dir: Path, overrides: list[str], slow: int, how: str) -> None:
    """A run with one slow rank: in its forward passes, in loading data, or as a whole process."""
    forward, draw = Stage.forward, Samples.__getitem__

    def delay() -> None:
        if ranks.rank != slow:
            return
        if how == "stopped":
            _stop_for(SLEEP)
        else:
            time.sleep(SLEEP)

    def slow_forward(*args: Any) -> Any:
        if how != "loader":
            delay()
        return forward(*args)

    def slow_draw(samples: Samples, n: int) -> Any:
        if how == "loader":
            delay()
        return draw(samples, n)

    settings = ["--train.eval_interval", "0", "--log.interval", "2", "--log.tensorboard", "false", *overrides]
    with (
        mock.patch.object(Stage, "forward", slow_forward),
        mock.patch.object(Samples, "__getitem__", slow_draw),
    ):
        train(load_config(path, settings), ranks, run_dir)


def _stop_for(seconds: float) -> None:
    """Stop this process by SIGSTOP until another one continues it."""
    waker = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    waker.wait()


@pytest.mark.parametrize(
    ("overrides", "ranks", "slow", "how"),
    [
        ([], 2, 1, "sleep"),
        pytest.param([], 2, 0, "loader", marks=pytest.mark.slow),
        pytest.param(["--train.steps", "8"], 2, 1, "stopped", marks=pytest.mark.slow),
        pytest.param(["--parallel.tensor", "2"], 4, 2, "sleep", marks=pytest.mark.slow),
        pytest.param(["--parallel.pipeline", "2"], 4, 3, "sleep", marks=pytest.mark.slow),
    ],
    ids=["data", "loader", "stopped", "tensor", "pipeline"],
)
def test_a_slow_rank_is_found(
    config_path: Path, tmp_path: Path, rank_pool: RankPool, overrides: list[str], ranks: int, slow: int, how: str
) -> None:
    run_dir = tmp_path / "run"
    rank_pool.run(slow_run, ranks, config_path, run_dir, overrides, slow, how)
    found = json.loads((run_dir / "stragglers.json").read_text())
    assert found["step"] == metrics(run_dir)[-2]["step"]
    slowest = max(found["ranks"], key=lambda rank: rank["ratio"])
    assert slowest["rank"] == slow
    micro_batches = 8 // 2 // (ranks if not overrides or ranks == 2 else 2)
    assert slowest["work_seconds"] > micro_batches * SLEEP
    lines = [line for line in (run_dir / "console.log").read_text().splitlines() if "stragglers: " in line]
    # Others may look slow for a while on a busy machine.
    assert f"rank {slow} on " in lines[0]
    imbalance = [line["data_parallel_imbalance"] for line in metrics(run_dir) if "loss" in line]
    assert statistics.median(imbalance) > 1.2  # not of the first step, in which all are slow
    # Those that wait for it do not look slow.
    others = [rank["work_seconds"] for rank in found["ranks"] if rank["rank"] != slow]
    assert max(others) < micro_batches * SLEEP


def work(*seconds: float, tensor: int = 1, pipeline: int = 1, step: int = 1) -> Work:
    axes = Axes.of(tensor=tensor, data=len(seconds) // tensor // pipeline, pipeline=pipeline)
    return Work(step=step, seconds=seconds, axes=axes, hosts=tuple(f"n{rank // 2}" for rank in range(len(seconds))))


def test_ranks_are_compared_with_those_of_their_stage() -> None:
    uneven = work(1.0, 1.0, 3.0, 4.5, pipeline=2)
    assert uneven.slow() == {3}
    assert [uneven.ratio(rank) for rank in range(4)] == [1.0, 1.0, 1.0, 1.5]
    assert uneven.slowest_hosts() == [("n1", 1.25), ("n0", 1.0)]
    assert work(1.0, 9.0, pipeline=2).slow() == set()  # nobody to compare with


def test_a_line_comes_once_after_several_slow_steps(tmp_path: Path) -> None:
    grid = mock.Mock(axes=Axes.of(), all_gather=lambda host, _: [host])
    stragglers = Stragglers(grid, tmp_path / "stragglers.json")
    slow, fine = work(1.0, 1.0, 1.31, step=7), work(1.0, 1.0, 1.0)

    def reported(*measured: Work) -> Iterator[bool]:
        return (stragglers.report(each) is not None for each in measured)

    assert list(reported(slow, slow, fine, slow, slow, slow, slow)) == [False, False, False, False, False, True, False]
    assert list(reported(fine, slow, slow)) == [False, False, False]
    line = stragglers.report(slow)
    assert line == "step 7: stragglers: rank 2 on n1: 1.31x the median of its peers (1.310 s of work per step)"


def test_unwritable_file_raises_nothing(tmp_path: Path) -> None:
    work(1.0, 2.0).write(tmp_path / "missing" / "stragglers.json")
    work(1.0, 2.0).write(tmp_path / "stragglers.json")
    assert [path.name for path in tmp_path.iterdir()] == ["stragglers.json"]


def test_one_rank_alone_leaves_no_report_of_an_earlier_attempt(tmp_path: Path) -> None:
    grid = mock.Mock(axes=Axes.of(), all_gather=lambda host, _: [host])
    path = tmp_path / "stragglers.json"
    work(1.0, 2.0).write(path)
    for step in (1, 2):
        assert Stragglers(grid, path).record(step, [1.0]) is None
        assert not path.exists()

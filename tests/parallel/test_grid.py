"""Ranks' places, and work that the first rank does for all."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from griffin.parallel.config import ParallelConfig
from griffin.parallel.world import grid as grid_module
from griffin.parallel.world.grid import rank_grid, single_rank_grid
from tests.ranks import RankError, RankPool


def place(ranks: Any, layout: ParallelConfig) -> dict[str, Any]:
    with rank_grid(layout, ranks) as grid:
        return {
            "rank": (grid.rank, grid.world_size),
            "tensor": (grid.tensor_rank, grid.tensor_size),
            "data": (grid.data_rank, grid.data_size),
            "pipeline": (grid.pipeline_rank, grid.pipeline_size),
            "tensor_group": dist.get_process_group_ranks(grid.tensor_group),
            "is_first_rank": grid.is_first_rank,
            "is_last_stage": grid.is_last_stage,
        }


@pytest.mark.parametrize(
    ("tensor", "data", "pipeline"), [(2, 1, 2), (2, 2, 1), (1, 2, 2), (4, 1, 1), (1, 4, 1), (1, 1, 3)]
)
def test_tensor_ranks_are_neighbours_then_data_then_pipeline(
    rank_pool: RankPool, tensor: int, data: int, pipeline: int
) -> None:
    size = tensor * data * pipeline
    answers = rank_pool.run(place, size, ParallelConfig(tensor=tensor, pipeline=pipeline))
    for rank, answer in enumerate(answers):
        t, d, p = rank % tensor, rank // tensor % data, rank // (tensor * data)
        assert answer == {
            "rank": (rank, size),
            "tensor": (t, tensor),
            "data": (d, data),
            "pipeline": (p, pipeline),
            "tensor_group": list(range(rank - t, rank - t + tensor)),
            "is_first_rank": rank == 0,
            "is_last_stage": p == pipeline - 1,
        }


def wait_for_slow_work(ranks: Any, path: Path) -> dict[str, Any]:
    calls = []

    def build() -> None:
        calls.append("build")
        time.sleep(1)
        path.write_text("built")

    poll = datetime.timedelta(milliseconds=50)
    with rank_grid(ParallelConfig(), ranks) as grid, patch.object(grid_module, "POLL", poll):
        dist.barrier()
        start = time.monotonic()
        grid.first_rank_does("build", build)
        waited = time.monotonic() - start
        found = path.read_text()
        grid.first_rank_does("again", lambda: calls.append("again"))
        return {"calls": calls, "waited": waited, "found": found}


def test_others_wait_for_the_first_rank_beyond_any_poll(rank_pool: RankPool, tmp_path: Path) -> None:
    answers = rank_pool.run(wait_for_slow_work, 3, tmp_path / "index")
    assert [answer["calls"] for answer in answers] == [["build", "again"], [], []]
    assert all(answer["found"] == "built" for answer in answers)
    assert all(answer["waited"] > 0.5 for answer in answers), "twenty polls, less what the barrier let ranks differ"


def fail_on_the_first_rank(ranks: Any) -> dict[str, Any]:
    def fail() -> None:
        raise FileNotFoundError("no data/a.idx")

    calls: list[str] = []
    with rank_grid(ParallelConfig(), ranks) as grid:
        try:
            grid.first_rank_does("index", fail)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        else:
            failure = ""
        grid.first_rank_does("after", lambda: calls.append("after"))
        return {"failure": failure, "calls": calls}


def test_a_failure_of_the_first_rank_ends_the_others(rank_pool: RankPool) -> None:
    first, *others = rank_pool.run(fail_on_the_first_rank, 3)
    assert first == {"failure": "FileNotFoundError: no data/a.idx", "calls": ["after"]}
    for other in others:
        assert other == {
            "failure": "OtherRankError: rank 0 failed at index: FileNotFoundError: no data/a.idx",
            "calls": [],
        }


def test_a_single_rank() -> None:
    calls: list[str] = []
    for _ in range(2):  # it leaves nothing behind that would hinder the next
        with single_rank_grid() as grid:
            assert (grid.rank, grid.world_size, grid.data_size, grid.is_last_stage) == (0, 1, 1, True)
            assert grid.device.type == "cpu"
            grid.first_rank_does("work", lambda: calls.append("work"))
            with pytest.raises(ZeroDivisionError):
                grid.first_rank_does("failing work", lambda: 1 / 0)
        assert not dist.is_initialized()
    assert calls == ["work", "work"]


def test_a_failure_inside_leaves_no_process_group() -> None:
    with pytest.raises(ZeroDivisionError), single_rank_grid():
        _ = 1 / 0
    assert not dist.is_initialized()


def when_left(ranks: Any) -> float:
    stop = dist.destroy_process_group

    def stop_slowly() -> None:
        stop()
        time.sleep(2.0 * ranks.rank)

    with patch.object(dist, "destroy_process_group", stop_slowly), rank_grid(ParallelConfig(), ranks):
        pass
    return time.monotonic()


def test_ranks_leave_together(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(when_left, 2)
    assert abs(first - second) < 1


def without_gpu(ranks: Any) -> None:
    backend = "gloo" if ranks.rank == 1 else "nccl"
    if ranks.rank == 1:
        time.sleep(1)  # then it is this rank that finds out
    with (
        patch.object(grid_module, "backend_of", lambda device: backend),
        patch.object(dist, "init_process_group", lambda *args, **kwargs: time.sleep(60)),
        rank_grid(ParallelConfig(), ranks),
    ):
        pass


def test_a_rank_that_has_lost_its_gpus_ends_the_start(rank_pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 on \S+ sees no GPU, but rank 0 on \S+ sees a GPU"):
        rank_pool.run(without_gpu, 2)


@pytest.mark.slow
def test_connections_that_never_come_end_the_process() -> None:
    code = """
import time
import torch.distributed as dist
from griffin.launch.ranks import discover
from griffin.parallel.world import grid
from griffin.parallel.config import ParallelConfig
grid.START_SECONDS = 1.0
def never_connected(*args, **kwargs):
    time.sleep(600)
dist.init_process_group = never_connected
with grid.rank_grid(ParallelConfig(), discover()):
    pass
"""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | place, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "in never_connected" in done.stderr

"""Coordinates of ranks, work of the first rank, startup and shutdown."""

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
from griffin.parallel.world.grid import rank_grid, set_cuda_defaults, single_rank_grid
from tests.ranks import RankError, RankPool


def coordinates(ranks: Any, layout: ParallelConfig) -> dict[str, Any]:
    with rank_grid(layout, ranks) as grid:
        return {
            "rank": (grid.rank, grid.world_size),
            "tensor": (grid.tensor_rank, grid.tensor_size),
            "data": (grid.data_rank, grid.data_size),
            "pipeline": (grid.pipeline_rank, grid.pipeline_size),
            "tensor_group": dist.get_process_group_ranks(grid.tensor_group),
            "replica_group": dist.get_process_group_ranks(grid.replica_group),
            "is_first_replica": grid.is_first_replica,
            "reports_loss": grid.reports_loss,
            "is_first_rank": grid.is_first_rank,
            "is_last_stage": grid.is_last_stage,
        }


@pytest.mark.parametrize(
    ("tensor", "data", "pipeline"), [(2, 1, 2), (2, 2, 1), (1, 2, 2), (4, 1, 1), (1, 4, 1), (1, 1, 3)]
)
def test_rank_order_is_tensor_data_pipeline(rank_pool: RankPool, tensor: int, data: int, pipeline: int) -> None:
    size = tensor * data * pipeline
    answers = rank_pool.run(coordinates, size, ParallelConfig(tensor=tensor, pipeline=pipeline))
    for rank, answer in enumerate(answers):
        t, d, p = rank % tensor, rank // tensor % data, rank // (tensor * data)
        assert answer == {
            "rank": (rank, size),
            "tensor": (t, tensor),
            "data": (d, data),
            "pipeline": (p, pipeline),
            "tensor_group": list(range(rank - t, rank - t + tensor)),
            "replica_group": [(p * data + replica) * tensor + t for replica in range(data)],
            "is_first_replica": d == 0,
            "reports_loss": t == 0 and p == pipeline - 1,
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


def test_others_wait_for_the_first_rank_without_a_limit(rank_pool: RankPool, tmp_path: Path) -> None:
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


def test_a_failure_destroys_the_process_group() -> None:
    with pytest.raises(ZeroDivisionError), single_rank_grid():
        _ = 1 / 0
    assert not dist.is_initialized()


def leave_time(ranks: Any) -> float:
    stop = dist.destroy_process_group

    def stop_slowly() -> None:
        stop()
        time.sleep(2.0 * ranks.rank)

    with patch.object(dist, "destroy_process_group", stop_slowly), rank_grid(ParallelConfig(), ranks):
        pass
    return time.monotonic()


def test_ranks_leave_together(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(leave_time, 2)
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


def test_a_rank_that_has_lost_its_gpus_fails_startup(rank_pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 on \S+ sees no GPU, but rank 0 on \S+ sees a GPU"):
        rank_pool.run(without_gpu, 2)


@pytest.mark.slow
def test_startup_has_a_time_limit() -> None:
    code = """
import time
import torch.distributed as dist
from griffin.launch.discovery import discover
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


@pytest.mark.parametrize(
    ("tensor", "given", "connections", "allocator"),
    [
        (1, {}, None, "expandable_segments:True"),
        (2, {}, "1", "expandable_segments:True"),
        (2, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8", "expandable_segments:True"),
        (1, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None, "max_split_size_mb:64"),
        (1, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "NCCL_GRAPH_REGISTER": "1"}, None, None),
    ],
)
def test_defaults_of_cuda_give_way_to_the_user_s(
    tensor: int, given: dict[str, str], connections: str | None, allocator: str | None
) -> None:
    with patch.dict(os.environ):
        for name in (
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "NCCL_GRAPH_REGISTER",
            "PYTORCH_ALLOC_CONF",
            "PYTORCH_CUDA_ALLOC_CONF",
        ):
            os.environ.pop(name, None)
        os.environ.update(given)
        set_cuda_defaults(ParallelConfig(tensor=tensor))
        assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == connections
        assert os.environ.get("PYTORCH_ALLOC_CONF") == allocator
        assert os.environ["NCCL_GRAPH_REGISTER"] == given.get("NCCL_GRAPH_REGISTER", "0")

"""Jobs of `griffin launch slurm` on a real SLURM cluster of two nodes: they train, and survive what happens to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import Cluster, running_cluster, why_not
from tests.small_runs import saved_steps, series, write_config

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

LAYOUT = ["--parallel.tensor=2", "--train.micro_batch=4"]  # data 2 on four ranks


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(cluster: Cluster) -> Path:
    return write_config(cluster.folder)


def test_job_trains_on_two_nodes(cluster: Cluster, config: Path) -> None:
    """The script as it is written, TP 2 x DP 2: ranks of another node do not find localhost."""
    run_dir = cluster.folder / "smoke"
    number = cluster.launch(config, run_dir, *LAYOUT, "--train.steps=3", "--train.eval_interval=0", "--log.interval=1")
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), cluster.output(number)
    assert list(series(run_dir, "loss")) == [1, 2, 3]
    assert saved_steps(run_dir) == [3]
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (environment["launched_by"], environment["world_size"]) == ("slurm", 4)
    assert environment["layout"] | {"sequence_parallel": None} == {
        "tensor": 2,
        "pipeline": 1,
        "virtual_pipeline": 1,
        "sequence_parallel": None,
        "data": 2,
    }
    assert "start 1 on n[1-2]; newest checkpoint: none" in cluster.output(number)

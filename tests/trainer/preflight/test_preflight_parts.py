"""Parts of the checks before the first step: rounds of links, verdicts, and what a device is asked."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from griffin.parallel.world.axes import rank_names
from griffin.parallel.world.grid import rank_grid, single_rank_grid
from griffin.trainer.checkpoint.steps import steps
from griffin.trainer.measuring.peak import best_seconds, measured_tflops
from griffin.trainer.preflight import machine
from griffin.trainer.preflight.agreement import PreflightError, RankLocation
from griffin.trainer.preflight.assessment import Assessment, checkpoint_bytes
from griffin.trainer.preflight.links import Exchanges, Link, link_rounds, pattern, ring_rounds
from griffin.trainer.preflight.machine import GIB, code_digest, nvml_state, occupied, product_fault
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config
from tests.ranks import RankPool
from tests.small_runs import run, write_config

CPU = torch.device("cpu")


@given(st.integers(0, 40))
def test_rings(size: int) -> None:
    rounds = ring_rounds(size)
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert set(pairs) == {frozenset((index, (index + 1) % size)) for index in range(size) if size > 1}
    assert len(pairs) == len(set(pairs))
    assert len(rounds) <= 3
    for round in rounds:
        members = [member for pair in round for member in pair]
        assert len(members) == len(set(members))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_links_of_hosts(counts: list[int]) -> None:
    numbers = iter(range(100))
    hosts = [[next(numbers) for _ in range(count)] for count in counts]
    rounds = link_rounds(hosts)
    assert len(rounds) <= 6
    for round in rounds:
        ranks = [rank for pair in round for rank in pair]
        assert len(ranks) == len(set(ranks))
    linked = {rank for pairs in rounds for pair in pairs for rank in pair}
    assert linked == {
        rank for ranks in hosts for rank in ranks if sum(counts) > 1 and (len(ranks) > 1 or len(hosts) > 1)
    }


@pytest.mark.parametrize("size", [2, 1000, 8192])
def test_sums_are_exact(size: int) -> None:
    total = sum(pattern(rank, 5, CPU) for rank in range(size))
    assert isinstance(total, torch.Tensor)
    assert total.tolist() == [sum(rank % 8 + index for rank in range(size)) for index in range(5)]


def test_names_of_ranks() -> None:
    hosts = {rank: f"n{rank // 8}" for rank in range(800)}
    assert rank_names([3], hosts) == "rank 3 on n0"
    assert rank_names([5, 1, 2, 3, 8, 10], hosts) == "ranks 1-3, 5 on n0; ranks 8, 10 on n1"
    assert rank_names([3, 4], {}) == "ranks 3, 4"
    assert rank_names(range(800), hosts).endswith("ranks 56-63 on n7; 736 ranks of 92 more hosts")


def slow_links(slow: dict[tuple[int, int], float], hosts: int = 4, ranks: int = 2) -> list[str]:
    """Warnings about links, some of which are slow."""
    locations = [
        RankLocation(rank=rank, local_rank=rank % ranks, host=f"n{rank // ranks}") for rank in range(hosts * ranks)
    ]
    assessment = Assessment(None, None, Path())  # type: ignore[arg-type]  # of no use for links
    assessment.add_ranks(locations)
    rounds = link_rounds([range(host * ranks, (host + 1) * ranks) for host in range(hosts)])
    links = [Link(pair=pair, seconds=1e-5, bandwidth=slow.get(pair, 1e10)) for pairs in rounds for pair in pairs]
    assert assessment.add_links([Exchanges(links=tuple(links))]) == bool(slow)
    return assessment._slow_links()


def test_a_host_whose_links_are_all_slow_is_the_culprit() -> None:
    assert slow_links({}) == []
    assert slow_links({(0, 2): 1e9, (1, 3): 1e9, (2, 4): 1e9, (3, 5): 2e9}) == [
        "n1: all its links between hosts are slow: at most 2 GB/s, usual is 10 GB/s"
    ]


def test_a_single_slow_link_is_named() -> None:
    assert slow_links({(2, 4): 1e9}) == ["slow link between hosts: rank 2 (n1) - rank 4 (n2) 1 GB/s, usual is 10 GB/s"]


def test_a_link_that_was_slow_once_is_not() -> None:
    assessment = Assessment(None, None, Path())  # type: ignore[arg-type]
    assessment.add_ranks([RankLocation(rank=rank, local_rank=0, host=f"n{rank}") for rank in range(4)])
    for slow in (1e9, 1e10):
        rates = {(0, 1): 1e10, (1, 2): slow, (2, 3): 1e10, (3, 0): 1e10}
        links = tuple(Link(pair=pair, seconds=1e-5, bandwidth=rate) for pair, rate in rates.items())
        assert assessment.add_links([Exchanges(links=links)]) == (slow == 1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_fault(CPU, dtype) == ""
    monkeypatch.setattr(machine, "multiply", lambda a, b: (a @ b).roll(1, 0))
    assert "is wrong in" in product_fault(CPU, dtype)


def test_occupied() -> None:
    assert occupied(77 * GIB, 80 * GIB, 0) == []
    assert occupied(60 * GIB, 80 * GIB, 15 * GIB) == []
    assert occupied(70 * GIB, 80 * GIB, 0) == [
        "10.0 of 80.0 GiB are in use already, at most 8.0 are accepted: another process runs on it"
    ]


class NVMLError(Exception):
    pass


def nvml(rows: tuple[int, int, int, int], errors: int | None, reasons: int) -> Any:
    def count(*_: object) -> int:
        if errors is None:
            raise NVMLError("not supported")
        return errors

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        nvmlClocksThrottleReasonHwThermalSlowdown=64,
        nvmlClocksThrottleReasonSwThermalSlowdown=32,
        nvmlDeviceGetRemappedRows=lambda handle: rows,
        nvmlDeviceGetTotalEccErrors=count,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons,
    )


def test_faults_and_oddities_from_nvml() -> None:
    assert nvml_state(nvml((3, 0, 0, 0), None, 1), None) == ([], [])
    faults, oddities = nvml_state(nvml((0, 1, 1, 1), 2, 32), None)
    assert len(faults) == 1
    assert "could not be remapped" in faults[0]
    assert [text.split()[0] for text in oddities] == ["rows", "2", "its"]


def test_rates_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert 1e-4 < measured_tflops(CPU, torch.float32) < 100
    assert torch.equal(torch.get_rng_state(), before)


def test_the_best_time_counts() -> None:
    pauses = iter([0.2, 0.1, 0.01, 0.1])  # the first does not count
    assert 0.01 <= best_seconds(CPU, lambda: time.sleep(next(pauses)), 3) < 0.1
    assert next(pauses, None) is None


def test_code_digest() -> None:
    assert code_digest() == code_digest()
    assert len(bytes.fromhex(code_digest())) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_size_of_a_checkpoint(rank_pool: RankPool, tmp_path: Path, dtype: str) -> None:
    """The predicted size is that of a saved checkpoint, except for metadata and the padding of small chunks."""
    overrides = ["--train.dtype", dtype, "--train.steps", "1", "--train.eval_interval", "0"]
    config = load_config(write_config(tmp_path), overrides)
    rank_pool.run(run, 1, config, tmp_path / "run")
    ((_, step),) = steps(tmp_path / "run/checkpoints")
    saved = sum(path.stat().st_size for path in step.rglob("*") if path.is_file() and path.suffix != ".json")
    with single_rank_grid() as grid:
        assert checkpoint_bytes(config, grid) == pytest.approx(saved, rel=0.1)


def size_on_ranks(ranks: Any, config: Config) -> int:
    with rank_grid(config.parallel, ranks) as grid:
        return checkpoint_bytes(config, grid)


def test_size_of_a_checkpoint_is_that_of_the_whole_model(rank_pool: RankPool, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2"]
    (one,) = rank_pool.run(size_on_ranks, 1, load_config(path))
    assert rank_pool.run(size_on_ranks, 4, load_config(path, layout)) == [one] * 4


def test_errors_travel() -> None:
    error = PreflightError(["a is b", "c"], ["odd"], ["line"])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.failures, copy.warnings, copy.lines) == (("a is b", "c"), ("odd",), ("line",))
    assert str(copy) == "2 checks before the first step failed:\n- a is b\n- c"

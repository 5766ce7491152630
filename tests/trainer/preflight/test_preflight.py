"""Preflight of several ranks: results, warnings and failures."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from griffin.parallel.world.grid import rank_grid
from griffin.parallel.world.ranks import Ranks
from griffin.trainer.preflight import agreement, check, clocks, links, machine
from griffin.trainer.preflight import folder as folder_module
from griffin.trainer.preflight.agreement import PreflightError
from griffin.trainer.preflight.check import preflight
from griffin.trainer.preflight.folder import probe
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config
from tests.ranks import RankPool
from tests.small_runs import metrics, run, write_config

HOSTS = ("north", "north", "south", "south")  # of four ranks
SLOW = 100.0  # factor, larger than differences that a busy machine measures

# What is patched on one rank: module and name -> function from the old value to the new one.
Changes = Mapping[tuple[ModuleType, str], Callable[[Any], Any]]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("preflight"))


@pytest.fixture(scope="module")
def config(config_path: Path) -> Config:
    return load_config(config_path)


def examine(
    ranks: Ranks,
    config: Config,
    run_dir: Path,
    changes: Mapping[int, Changes] | None = None,
    configs: Mapping[int, Config] | None = None,
    absent: Sequence[int] = (),
    limit: float = 30.0,
) -> dict[str, Any]:
    """Run preflight on this rank of two hosts. `changes` and `configs` are by rank."""
    ranks = dataclasses.replace(ranks, local_rank=ranks.rank % 2)
    config = (configs or {}).get(ranks.rank, config)
    said: list[str] = []
    begun = time.monotonic()
    try:
        with rank_grid(config.parallel, ranks) as grid, ExitStack() as stack:
            stack.enter_context(mock.patch.object(check, "host_name", return_value=HOSTS[ranks.rank]))
            for (module, name), change in (changes or {}).get(ranks.rank, {}).items():
                stack.enter_context(mock.patch.object(module, name, change(getattr(module, name))))
            if ranks.rank in absent:
                time.sleep(2 * limit)
                raise TimeoutError("absent")  # as a rank that is ended; others do not wait for it at the end
            begun = time.monotonic()
            answer: dict[str, Any] = {"found": preflight(config, ranks, grid, run_dir, said.append, limit=limit)}
    except PreflightError as error:
        answer = {"failures": error.failures}
        dist.destroy_process_group()
    except TimeoutError:
        answer = {}
        dist.destroy_process_group()
    return answer | {"said": "\n".join(said), "seconds": time.monotonic() - begun}


def failures(answers: list[dict[str, Any]]) -> str:
    """The failures, which all ranks raise alike."""
    assert all(answer.get("failures") for answer in answers), answers
    assert len({answer["failures"] for answer in answers}) == 1
    return "\n".join(answers[0]["failures"])


def warnings(answers: list[dict[str, Any]]) -> str:
    """The warnings, which are printed; nothing fails."""
    found = answers[0]["found"]
    assert all(answer["found"] == found for answer in answers)
    for text in found.warnings:
        assert f"PREFLIGHT WARNING: {text}" in answers[0]["said"]
    return "\n".join(found.warnings)


@dataclasses.dataclass(frozen=True)
class Added:
    """Adds values to the dict that a function returns."""

    values: dict[str, str]

    def __call__(self, function: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
        return lambda: function() | self.values


@dataclasses.dataclass(frozen=True)
class Constant:
    value: Any

    def __call__(self, old: Any) -> Any:
        return self.value


@dataclasses.dataclass(frozen=True)
class Returns:
    value: Any

    def __call__(self, old: Any) -> Any:
        return lambda *args, **kwargs: self.value


@dataclasses.dataclass(frozen=True)
class Times:
    """Multiplies the result of a function, or its first item, by `factor` in its first `calls` calls."""

    factor: float
    calls: float = float("inf")

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        made: list[None] = []

        def changed(*args: Any) -> Any:
            made.append(None)
            factor = self.factor if len(made) <= self.calls else 1.0
            found = function(*args)
            return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

        return changed


def test_a_healthy_world(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    answers = rank_pool.run(examine, 4, config, tmp_path)
    warnings(answers)
    found, text = answers[0]["found"], answers[0]["said"]
    assert [line.partition(":")[0] for line in found.lines] == [
        "ranks",
        "versions",
        "run folder",
        "clocks",
        "memory",
        "devices",
        "links within a host",
        "links between hosts",
        "all-reduce",
    ]
    assert all(line in text for line in found.lines)
    assert "ranks: 4: 2 on north, 2 on south" in text
    assert f"torch {torch.__version__}" in text
    within, between, _ = found.lines[-3:]
    assert {"rank 0 (north) - rank 1 (north)", "rank 2 (south) - rank 3 (south)"} == slowest_and_fastest(within)
    assert {"rank 0 (north) - rank 2 (south)", "rank 1 (north) - rank 3 (south)"} == slowest_and_fastest(between)
    assert list(tmp_path.iterdir()) == []


def slowest_and_fastest(line: str) -> set[str]:
    _, slowest, fastest = line.split("; ")
    assert slowest.startswith("slowest ")
    assert fastest.startswith("fastest ")
    return {text.split(" ", 1)[1].rsplit(" ", 2)[0] for text in (slowest, fastest)}


def test_a_single_rank(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    (answer,) = rank_pool.run(examine, 1, config, tmp_path)
    assert "1 x CPU" in answer["said"]
    assert "links" not in answer["said"]
    assert list(tmp_path.iterdir()) == []


def test_all_disagreements_are_named_together(
    rank_pool: RankPool, config_path: Path, config: Config, tmp_path: Path
) -> None:
    versions = (machine, "versions")
    changes: dict[int, Changes] = {
        1: {versions: Added({"torch": "1.0"})},
        3: {versions: Added({"torch": "1.0", "NVIDIA driver": "9.9"})},
    }
    configs = {2: load_config(config_path, ["--train.seed", "5", "--data.workers", "3"])}
    text = failures(rank_pool.run(examine, 4, config, tmp_path, changes, configs))
    # Of equally many, rank 0's version is taken to be the right one.
    assert f"torch differs: 1.0 on rank 1 on north; rank 3 on south; {torch.__version__} on 2 ranks" in text
    assert "NVIDIA driver differs: 9.9 on rank 3 on south; absent on 3 ranks" in text
    assert "settings differ: rank 2 on south against 3 ranks: data.workers 3 -> 0, train.seed 5 -> 0" in text
    assert list(tmp_path.iterdir()) == []


def test_different_environment_is_a_warning(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    variables = {"NCCL_ALGO": "Ring"}
    changes: dict[int, Changes] = {2: {(os, "environ"): Constant(variables)}}
    text = warnings(rank_pool.run(examine, 4, config, tmp_path, changes))
    assert "NCCL_ALGO differs: Ring on rank 2 on south; unset on 3 ranks" in text


def off_by_one(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def changed(a: Tensor, b: Tensor) -> Tensor:
        product = multiply(a, b)
        product[3, 5] += 1
        return product

    return changed


def test_a_device_that_multiplies_wrongly(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    text = failures(rank_pool.run(examine, 4, config, tmp_path, {3: {(machine, "multiply"): off_by_one}}))
    assert "rank 3 on south: CPU: a matrix product of integers in float32 is wrong in 1 of 128^2 elements" in text
    assert "first [3, 5]: 1, must be 0" in text


def fails(function: Any) -> Callable[..., float]:
    def changed(*args: Any) -> float:
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")

    return changed


def test_a_device_that_fails(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    text = failures(rank_pool.run(examine, 4, config, tmp_path, {1: {(machine, "measured_tflops"): fails}}))
    assert text == "rank 1 on north: CPU: it does not compute: CUDA error: unspecified launch failure"


def corrupted(all_reduce: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def changed(tensor: Tensor) -> Any:
        work = all_reduce(tensor)
        work.wait()
        tensor[7] += 1
        return work

    return changed


def test_a_wrong_all_reduce(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    text = failures(rank_pool.run(examine, 4, config, tmp_path, {2: {(links, "all_reduce"): corrupted}}))
    # Element 7 is 2 + r on rank r.
    assert "all-reduce on rank 2: 1 of 65536 sums are wrong, first [7]: 15, must be 14 (rank 2 is on south)" in text


def sends_garbage(pattern: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Corrupt what the rank sends, not what it expects from others."""
    return lambda rank, *args: pattern(rank, *args) + (rank == 2)


def test_a_link_that_corrupts(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    text = failures(rank_pool.run(examine, 4, config, tmp_path, {2: {(links, "pattern"): sends_garbage}}))
    failure = "rank 3 exchanging data with rank 2: other values arrived than were sent (rank 3 is on south)"
    assert failure in text


@dataclasses.dataclass(frozen=True)
class Rate:
    """A fixed rate of matrix products, whatever this machine's load: `first` in the first measurement, then `rate`."""

    first: float
    rate: float

    def __call__(self, old: Any) -> Callable[..., float]:
        rates = itertools.chain([self.first], itertools.repeat(self.rate))
        return lambda *args: next(rates)


def rated(*first: float, rate: float | None = None) -> dict[int, Changes]:
    """Rates that the ranks measure, in TFLOP/s; all copies take the same time."""
    return {
        rank: {
            (machine, "measured_tflops"): Rate(each, each if rate is None else rate),
            (machine, "best_seconds"): Returns(0.01),
        }
        for rank, each in enumerate(first)
    }


def test_a_slow_device_is_named(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    text = warnings(rank_pool.run(examine, 4, config, tmp_path, rated(1.0, 1.0, 0.4, 0.4)))
    assert "rank 2 on south: CPU is slow: 0.4 TFLOP/s, the median is 0.7" in text
    assert text.count("CPU is slow") == 1


def test_ranks_that_share_the_cores_of_a_host_are_one_device(
    rank_pool: RankPool, config: Config, tmp_path: Path
) -> None:
    text = warnings(rank_pool.run(examine, 4, config, tmp_path, rated(1.0, 0.1, 0.2, 0.9)))
    assert "CPU is slow" not in text


def test_a_device_that_was_slow_once_is_not(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    text = warnings(rank_pool.run(examine, 4, config, tmp_path, rated(1.0, 1.0, 0.1, 0.1, rate=1.0)))
    assert "CPU is slow" not in text


def test_a_slow_link_is_named(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    changes: dict[int, Changes] = {0: {(links, "exchange"): Times(SLOW)}}
    text = warnings(rank_pool.run(examine, 4, config, tmp_path, changes))
    assert "slow link between hosts: rank 0 (north) - rank 2 (south)" in text
    assert "within a host" not in text  # on a CPU, where rank 0 is as slow with rank 1, that says nothing


def test_a_host_that_does_not_see_the_folder(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    changes: dict[int, Changes] = {
        2: {(check, "probe"): probe_elsewhere, (folder_module, "PATIENCE_SECONDS"): Constant(0.1)}
    }
    text = failures(rank_pool.run(examine, 4, config, tmp_path / "run", changes))
    assert text == f"south (rank 2) does not see {tmp_path} as rank 0 has written it: the run folder must be shared"
    assert list((tmp_path / "run").iterdir()) == []


def probe_elsewhere(function: Any) -> Callable[[Path, int], str]:
    """Probe a folder of the same name on another disk."""
    return lambda folder, rank: probe(folder.parents[1] / folder.name, rank)


def test_a_host_whose_files_rank_0_does_not_see(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    changes: dict[int, Changes] = {
        0: {(folder_module, "PATIENCE_SECONDS"): Constant(0.1)},
        2: {(check, "probe"): Returns("")},
    }
    text = failures(rank_pool.run(examine, 4, config, tmp_path, changes))
    assert text == f"rank 2 on south: rank 0 does not see what they write in {tmp_path}"


def test_a_folder_that_cannot_be_written(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    text = failures(rank_pool.run(examine, 4, config, tmp_path / "absent"))
    assert text == f"north (rank 0) cannot write in {tmp_path / 'absent'}: No such file or directory"


def test_no_room_for_a_checkpoint(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    changes: dict[int, Changes] = {0: {(shutil, "disk_usage"): Returns(SimpleNamespace(free=100 * 2**10))}}
    text = failures(rank_pool.run(examine, 4, config, tmp_path, changes))
    assert text == f"{tmp_path}: 0.1 MiB free, must be at least 0.6 MiB, the size of one checkpoint"


def ahead(now: Callable[[], float]) -> Callable[[], float]:
    return lambda: now() + 5


def test_a_clock_that_is_ahead(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    answers = rank_pool.run(examine, 4, config, tmp_path, {2: {(clocks, "now"): ahead}})
    assert "south: its clock is 5.0 s ahead of that of north, at most 1 s are expected" in warnings(answers)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_never_arrives(rank_pool: RankPool, config: Config, tmp_path: Path, rank: int) -> None:
    changes: dict[int, Changes] = {each: {(agreement, "GRACE_SECONDS"): Constant(1.0)} for each in range(4)}
    answers = rank_pool.run(examine, 4, config, tmp_path, changes, absent=[rank], limit=2.0)
    del answers[rank]
    expected = "rank 3: not done with arriving within 2 s" if rank else "rank 0 was not done with arriving within 2 s"
    assert failures(answers) == expected
    assert all(answer["seconds"] < 2 + 4 for answer in answers)


def hangs(function: Any) -> Callable[..., Any]:
    return lambda *args: time.sleep(8)


@pytest.mark.slow
def test_a_rank_that_hangs_in_an_exchange(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    changes: dict[int, Changes] = {3: {(check, "measure_links"): hangs}}
    answers = rank_pool.run(examine, 4, config, tmp_path, changes, limit=6.0)
    text = failures(answers[:3])
    assert "rank 3 on south: not done with exchanging data with its neighbours within 6 s" in text
    assert "rank 2 exchanging data with rank 3: " in text
    assert all(answer["seconds"] < 12 for answer in answers[:3])


def test_preflight_comes_before_the_first_step(rank_pool: RankPool, config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1, eval_interval=0))
    rank_pool.run(run, 2, config, tmp_path / "run")
    text = (tmp_path / "run/console.log").read_text()
    assert text.index("Preflight, ") < text.index("all-reduce: ") < text.index("step 1/1")
    health = dataclasses.replace(config.health, preflight=False)
    rank_pool.run(run, 2, dataclasses.replace(config, health=health), tmp_path / "without")
    assert "Preflight" not in (tmp_path / "without/console.log").read_text()
    assert len(metrics(tmp_path / "without")) == len(metrics(tmp_path / "run"))

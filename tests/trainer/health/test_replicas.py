"""Replicated weights: any bit that differs between copies is found and named, and ends the run."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from griffin.parallel.world.ranks import Ranks
from griffin.trainer.health import replicas
from griffin.trainer.health.replicas import EMBEDDING, ReplicaError, checksum
from griffin.trainer.loop import train
from griffin.trainer.settings.complete import load_config
from griffin.trainer.step import Training
from tests.ranks import RankPool
from tests.small_runs import saved_steps, write_config

HOST = socket.gethostname()
CHUNK = 1 << 14  # as the tests of checksums have it


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("replicas"))


def flip_bit(weight: Tensor) -> None:
    """Flip the lowest bit of one element in the middle."""
    bits = weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()])
    bits[bits.numel() // 2] ^= 1


def swap(weight: Tensor) -> None:
    weight[[3, 4]] = weight[[4, 3]]
    assert weight[3] != weight[4]


Damage = Callable[[Tensor], None]


def damaged_run(
    ranks: Ranks,
    path: Path,
    run_dir: Path,
    overrides: list[str],
    damaged: tuple[int, ...],
    name: str,
    damage: Damage | None,
) -> str:
    """The error of a run whose weight `name` is damaged on some ranks before step 6; checked at steps 3, 6, ..."""
    make_step = Training.step

    def step(training: Training, *args: Any, **kwargs: Any) -> Any:
        if damage is not None and training.steps_done == 5 and ranks.rank in damaged:
            (weight,) = (
                parameter
                for stage in training.stages
                for parameter in stage.parameters()
                if name in [piece.name for piece in parameter.pieces]
            )
            damage(weight.data.view(-1))
        return make_step(training, *args, **kwargs)

    settings = ["--health.replica_interval", "3", "--checkpoint.interval", "3", "--train.eval_interval", "0"]
    with mock.patch.object(Training, "step", step):
        try:
            train(load_config(path, [*settings, "--log.tensorboard", "false", *overrides]), ranks, run_dir)
        except ReplicaError as error:
            torch.distributed.destroy_process_group()
            return str(error)
    return ""


LAYOUTS = {
    "tp2-dp2": ["--parallel.tensor", "2"],
    "dp4": ["--train.global_batch", "16"],
    "pp2-dp2": ["--parallel.pipeline", "2"],
}
MLP = "blocks.0.mlp.gate.weight"
NORM = "blocks.1.mixer_norm.weight"


def also(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize(
    ("layout", "damaged", "name", "damage", "expected"),
    [
        ("dp4", (2,), MLP, flip_bit, f"the copy of rank 2 on {HOST} differs from the other copies"),
        also("tp2-dp2", (3,), MLP, flip_bit, f"rank 1 on {HOST}, rank 3 on {HOST} differ, with no majority"),
        ("tp2-dp2", (1,), NORM, flip_bit, f"{NORM}: the copy of rank 1 on {HOST} differs from the other copies"),
        also("tp2-dp2", (1, 3), NORM, swap, f"{NORM}: the copies of rank 0 on {HOST}, rank 1 on {HOST}, rank 2"),
        ("pp2-dp2", (2,), EMBEDDING, swap, f"{EMBEDDING}: the copy of rank 2 on {HOST} differs"),
        also(
            "pp2-dp2",
            (2, 3),
            EMBEDDING,
            flip_bit,
            f"{EMBEDDING}: the copies of rank 0 on {HOST}, rank 1 on {HOST}, rank 2",
        ),
    ],
    ids=["majority", "two copies", "tensor", "tensor ranks only", "tied embedding", "stages only"],
)
def test_differing_replica_is_named_and_not_saved(
    rank_pool: RankPool,
    config_path: Path,
    tmp_path: Path,
    dtype: str,
    layout: str,
    damaged: tuple[int, ...],
    name: str,
    damage: Damage,
    expected: str,
) -> None:
    run_dir = tmp_path / "run"
    settings = [*LAYOUTS[layout], "--train.dtype", dtype]
    said = rank_pool.run(damaged_run, 4, config_path, run_dir, settings, damaged, name, damage)
    assert len(set(said)) == 1
    assert said[0].startswith("step 6: ")
    assert expected in said[0]
    assert name in said[0]
    assert set(saved_steps(run_dir)) <= {3}  # the save of step 3 may be under way still


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "overrides",
    [
        ["--parallel.tensor", "2", "--parallel.sequence_parallel", "true"],
        pytest.param(["--parallel.pipeline", "2", "--train.overlap", "on"], marks=pytest.mark.slow),
        pytest.param(
            ["--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2", "--model.pattern", "PATTERN"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--train.overlap", "on", "--train.global_batch", "16"], marks=pytest.mark.slow),
    ],
    ids=["tp2-dp2-sequence", "pp2-dp2-overlap", "virtual", "dp4-overlap"],
)
def test_equal_copies_pass(
    rank_pool: RankPool, config_path: Path, tmp_path: Path, overrides: list[str], dtype: str
) -> None:
    pattern = '["recurrent", "attention", "recurrent", "recurrent"]'
    settings = [setting.replace("PATTERN", pattern) for setting in overrides] + ["--train.dtype", dtype]
    run_dir = tmp_path / "run"
    assert rank_pool.run(damaged_run, 4, config_path, run_dir, settings, (), "", None) == [""] * 4
    assert saved_steps(run_dir)[-1] == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "CHUNK", CHUNK)
    value = torch.randn(CHUNK + 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = checksum(value)
    assert checksum(value.clone()) == expected
    assert checksum(value.view(8, -1)) == expected
    bits = value.view({2: torch.int16, 4: torch.int32}[value.element_size()])
    for place in (0, 1, 1234, CHUNK - 1, CHUNK, bits.numel() - 1):
        for bit in range(8 * bits.element_size()):
            before = bits[place].clone()
            bits[place] ^= torch.tensor(-1 << bit if bit == 8 * bits.element_size() - 1 else 1 << bit, dtype=bits.dtype)
            assert checksum(value[: place + 1]) != checksum_of(value, bits, place, before)
            bits[place] = before
    assert checksum(value) == expected
    for one, other in ((0, 1), (3, CHUNK - 2), (5, CHUNK + 5)):
        assert value[one] != value[other]
        value[[one, other]] = value[[other, one]]
        assert checksum(value) != expected
        value[[one, other]] = value[[other, one]]
    zeros, negative = torch.zeros(4, dtype=dtype), -torch.zeros(4, dtype=dtype)
    assert checksum(zeros) != checksum(negative)


def checksum_of(value: Tensor, bits: Tensor, place: int, before: Tensor) -> Tensor:
    """Checksum of the elements up to `place`, with the previous bits of the last one."""
    now = bits[place].clone()
    bits[place] = before
    found = checksum(value[: place + 1])
    bits[place] = now
    return found

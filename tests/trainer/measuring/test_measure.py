"""Figures of a logged step: they are the same in every layout, and measuring changes no weight."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from griffin.parallel import sharding
from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.axes import Axes
from griffin.parallel.world.grid import rank_grid
from griffin.trainer.measuring.figures import all_kinds, data_parallel_imbalance, kind_of, model_kinds, pipeline_bubble
from griffin.trainer.step import Training
from tests.layouts import LAYOUTS, RANKS, make_config, micro_batches
from tests.ranks import RankPool

STEPS = 3


def train(ranks: Any, layout: ParallelConfig, measure: bool, **settings: Any) -> dict[str, Any]:
    config = make_config("griffin", layout, **settings)
    with rank_grid(layout, ranks) as grid:
        training = Training(config, grid)
        results = [
            training.step(
                iter(micro_batches(config, step, grid.data_rank, grid.data_size)), measure=measure, health=measure
            )
            for step in range(STEPS)
        ]
        weights = sharding.gather(training.stages, grid)
        return {
            "loss": [result.loss for result in results],
            "grad_norm": [result.grad_norm for result in results],
            "measured": [dict(result.measured) for result in results],
            "health": [result.health.values() if result.health else None for result in results],
            "weights": weights,
        }


@pytest.fixture(scope="module")
def one_rank(rank_pool: RankPool) -> dict[str, Any]:
    return rank_pool.run(train, 1, ParallelConfig(), True)[0]


def test_norms_of_one_rank(one_rank: dict[str, Any]) -> None:
    weights = one_rank["weights"].values()
    expected = math.sqrt(sum(weight.double().square().sum().item() for weight in weights))
    assert one_rank["measured"][-1]["param_norm"] == pytest.approx(expected, rel=1e-6)
    for name in all_kinds():
        assert one_rank["measured"][0][f"grad_norm/{name}"] > 0


@pytest.mark.parametrize(
    "layout",
    ["tp2", "pp2", "dp2", "tp2-sequence-parallel", "tp2-pp2"]
    + [pytest.param(layout, marks=pytest.mark.slow) for layout in ("pp2-interleaved", "tp2-dp2", "pp2-dp2")],
)
def test_norms_and_health_are_those_of_one_rank(rank_pool: RankPool, one_rank: dict[str, Any], layout: str) -> None:
    answers = rank_pool.run(train, RANKS[layout], LAYOUTS[layout], True)
    for answer in answers:
        assert answer["measured"] == answers[0]["measured"], "every rank has the same"
        for measured, expected, norm in zip(answer["measured"], one_rank["measured"], answer["grad_norm"], strict=True):
            by_kind = [measured[f"grad_norm/{name}"] for name in all_kinds()]
            assert math.hypot(*by_kind) == pytest.approx(norm, rel=1e-5)
            for key in ("param_norm", *(f"grad_norm/{name}" for name in all_kinds())):
                assert measured[key] == pytest.approx(expected[key], rel=1e-5), key
        if "dp2" not in layout:  # replicas see other micro-batches first
            for health, expected in zip(answer["health"], one_rank["health"], strict=True):
                # A value at the end of a bin may, by rounding, fall into the next.
                assert health == pytest.approx(expected, rel=2e-3)


def test_a_pipeline_waits_and_one_stage_does_not(rank_pool: RankPool, one_rank: dict[str, Any]) -> None:
    assert {measured["pipeline_bubble"] for measured in one_rank["measured"]} == {0.0}
    for measured in rank_pool.run(train, 2, LAYOUTS["pp2"], True)[0]["measured"]:
        assert 0 < measured["pipeline_bubble"] < 1


@pytest.mark.parametrize(
    "recompute", ["none", *(pytest.param(part, marks=pytest.mark.slow) for part in ("mixer", "block", "states"))]
)
def test_measuring_changes_no_bit(rank_pool: RankPool, recompute: str) -> None:
    plain, measured = (
        rank_pool.run(train, 1, ParallelConfig(), measure, recompute=recompute)[0] for measure in (False, True)
    )
    assert plain["measured"] == [{}] * STEPS
    assert plain["health"] == [None] * STEPS
    assert plain["loss"] == measured["loss"]
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, measured["weights"][name]), name


def test_recomputation_is_seen_once(rank_pool: RankPool, one_rank: dict[str, Any]) -> None:
    answer = rank_pool.run(train, 1, ParallelConfig(), True, recompute="block")[0]
    assert answer["health"] == one_rank["health"]


def test_bfloat16_counts_the_master_weights(rank_pool: RankPool) -> None:
    one, two = (
        rank_pool.run(train, ranks, layout, True, dtype="bfloat16")[0]
        for ranks, layout in ((1, ParallelConfig()), (2, ParallelConfig(tensor=2)))
    )
    for measured, other in zip(one["measured"], two["measured"], strict=True):
        # Gradients are of bfloat16 activations; weights differ by a few of Adam's small steps.
        assert measured["param_norm"] == pytest.approx(other["param_norm"], rel=1e-4)
    rounded = math.sqrt(sum(weight.double().square().sum().item() for weight in one["weights"].values()))
    assert one["measured"][-1]["param_norm"] == pytest.approx(rounded, rel=1e-3)
    assert one["measured"][-1]["param_norm"] != pytest.approx(rounded, rel=1e-7)


def test_kinds() -> None:
    assert kind_of("blocks.11.recurrent.lin_x.weight") == "recurrent"
    assert kind_of("blocks.2.attention.query.weight") == "attention"
    assert kind_of("blocks.2.mlp_norm.weight") == kind_of("final_norm.weight") == "norm"
    assert kind_of("embedding.weight") == "embedding"
    assert model_kinds(make_config("griffin", ParallelConfig()).model) == all_kinds()
    assert model_kinds(make_config("hawk", ParallelConfig()).model) == ("recurrent", "mlp", "norm", "embedding")
    assert model_kinds(make_config("mqa", ParallelConfig()).model) == ("attention", "mlp", "norm", "embedding")


def test_the_bubble_of_one_forward_one_backward() -> None:
    stages, micro_batches = 4, 8
    compute = torch.full((stages,), micro_batches * 3.0)
    # The last stage ends first, by the backward passes of the others.
    schedule = torch.tensor([33.0, 31.0, 29.0, 27.0])
    assert pipeline_bubble(compute, schedule) == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    assert pipeline_bubble(schedule.max().expand(4), schedule) == 0.0
    assert pipeline_bubble(torch.zeros(2), torch.zeros(2)) == 0.0


def test_the_imbalance_of_replicas() -> None:
    grid: Any = SimpleNamespace(axes=Axes.of(pipeline=2, data=2, tensor=2))
    # Tensor first, then data, then pipeline: rank 6 is of the second replica.
    compute = torch.ones(8)
    assert data_parallel_imbalance(compute, grid) == 1.0
    compute[6] = 3.0
    assert data_parallel_imbalance(compute, grid) == pytest.approx(3.0 / 2.0)
    compute[4] = 3.0  # a stage that is slow in both replicas
    assert data_parallel_imbalance(compute, grid) == 1.0

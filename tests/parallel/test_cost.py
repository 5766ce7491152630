"""The cost model against counted operations, and the split over stages against all possible splits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from griffin.parallel import cost, sharding
from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.cost import split_blocks, train_flops_per_token
from griffin.parallel.mixers.attention import mean_keys
from griffin.parallel.stage import build_stages, stage_blocks
from griffin.parallel.world.grid import Grid, single_rank_grid
from griffin.trainer.settings.presets import PRESETS, preset

T, B, WINDOW = 50, 3, 16
MODEL = ModelConfig(
    pattern=(RECURRENT, RECURRENT),
    width=32,
    recurrent_width=80,
    heads=3,
    head_dim=8,
    gate_blocks=4,
    window=WINDOW,
    vocabulary=256,  # no padding: padded logits are computed but not counted as the model's
)
MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "add_product")


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    with single_rank_grid() as grid:
        yield grid


def counted_flops(model: ModelConfig, grid: Grid) -> int:
    """Matrix-product FLOPs of a forward and a backward pass over [B, T] tokens.

    PyTorch's counter knows no fused attention on CPU, so that attention is run as plain matrix products.
    """
    (stage,) = build_stages(model, ParallelConfig(), grid, dtype=torch.float32, sequence=T)
    sharding.initialize([stage], grid, seed=0)
    batch = {
        "tokens": torch.randint(0, model.vocabulary, (B, T)),
        "labels": torch.randint(0, model.vocabulary, (B, T)),
        "positions": torch.arange(T).expand(B, T).contiguous(),
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage(batch).total.backward()
    return sum(
        flops
        for operation, flops in counter.get_flop_counts()["Global"].items()
        if operation.__name__ in MATRIX_PRODUCTS
    )


def test_flops_of_a_recurrent_model_are_counted_exactly(grid: Grid) -> None:
    assert train_flops_per_token(MODEL, T) * T * B == counted_flops(MODEL, grid)


@pytest.mark.parametrize("mixer", [ATTENTION, GLOBAL_ATTENTION])
def test_flops_of_attention_exclude_only_masked_scores(grid: Grid, mixer: str) -> None:
    """Attention on CPUs computes whole blocks of scores; the formula counts only visible ones."""
    model = replace(MODEL, pattern=(RECURRENT, mixer, mixer))
    if mixer == ATTENTION:  # blocks of WINDOW queries over their own and the previous block's keys
        sizes = [min(WINDOW, T - first) for first in range(0, T, WINDOW)]
        computed = sum(queries * (before + queries) for before, queries in itertools.pairwise([0, *sizes]))
    else:
        computed = T * T
    seen = sum(min(t + 1, WINDOW if mixer == ATTENTION else T) for t in range(T))
    masked = 2 * B * 4 * model.attention_width * (computed - seen)  # of the two attention blocks
    assert computed > seen
    # The mean number of keys is not a whole number: float64 rounding.
    assert train_flops_per_token(model, T) * T * B == pytest.approx(counted_flops(model, grid) - 3 * masked, rel=1e-12)


@pytest.mark.parametrize("sequence", [1, 2, 7, 16, 17, 100])
@pytest.mark.parametrize("window", [None, 1, 2, 16, 200])
def test_mean_keys(sequence: int, window: int | None) -> None:
    seen = [min(t + 1, window or sequence) for t in range(sequence)]
    assert mean_keys(sequence, window) == pytest.approx(sum(seen) / sequence, rel=1e-12)


def slowest(blocks: list[float], first: float, last: float, sizes: tuple[int, ...]) -> float:
    ends = list(itertools.accumulate(sizes))
    times = [sum(blocks[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    times[0] += first
    times[-1] += last
    return max(times)


@pytest.mark.parametrize("seed", range(20))
def test_split_is_optimal(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    by_mixer = {mixer: draw(1, 10) for mixer in (RECURRENT, ATTENTION, GLOBAL_ATTENTION)}
    first, last = draw(0, 20), draw(0, 20)
    pattern = [list(by_mixer)[i] for i in torch.randint(3, (9,), generator=generator).tolist()]
    monkeypatch.setattr(cost, "block_cost", lambda model, mixer, sequence: cost.Cost(by_mixer[mixer], 0))
    monkeypatch.setattr(cost, "embedding_cost", lambda model: cost.Cost(first, 0))
    monkeypatch.setattr(cost, "logits_cost", lambda model: cost.Cost(last, 0))
    blocks = [by_mixer[mixer] for mixer in pattern]
    model = replace(MODEL, pattern=tuple(pattern))
    for stages in range(1, len(pattern) + 1):
        sizes = split_blocks(model, stages, T)
        assert len(sizes) == stages
        assert sum(sizes) == len(pattern)
        assert min(sizes) >= 1
        best = min(
            slowest(blocks, first, last, tuple(b - a for a, b in itertools.pairwise((0, *cuts, len(pattern)))))
            for cuts in itertools.combinations(range(1, len(pattern)), stages - 1)
        )
        assert slowest(blocks, first, last, sizes) == pytest.approx(best, rel=1e-12)


def test_equal_blocks_are_split_evenly() -> None:
    model = replace(MODEL, pattern=(RECURRENT,) * 40, vocabulary=1)  # neither embedding nor logits weigh
    assert split_blocks(model, 4, T) == (10, 10, 10, 10)
    assert sorted(split_blocks(model, 3, T)) == [13, 13, 14]


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith("00m")])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_split_of_presets(name: str, stages: int) -> None:
    """Logits replace blocks on the last stage, and every stage is within a block of the mean."""
    model = preset(name)
    sizes = split_blocks(model, stages, 2048)
    times = [cost.block_cost(model, mixer, 2048).time for mixer in model.pattern]
    first, last = cost.embedding_cost(model).time, cost.logits_cost(model).time
    assert sum(sizes) == model.blocks
    assert sizes[-1] == min(sizes)
    assert sizes[-1] < sizes[0]
    assert slowest(times, first, last, sizes) <= max(sum(times) + first + last, stages * last) / stages + max(times)


def test_split_of_griffin_14b() -> None:
    # 256,000 logits of 5,120 values are 1.31 G multiply-adds, those of a recurrent block 0.37 G: about 4 blocks.
    assert split_blocks(preset("griffin-14b"), 4, 2048) == (11, 11, 11, 7)


def test_configured_stages_take_precedence() -> None:
    model: Any = replace(MODEL, pattern=(RECURRENT,) * 6)
    assert stage_blocks(model, ParallelConfig(pipeline=2, stages=(1, 5)), T) == (1, 5)
    assert stage_blocks(model, ParallelConfig(pipeline=2), T) == split_blocks(model, 2, T)
    assert len(stage_blocks(model, ParallelConfig(pipeline=2, virtual_pipeline=2), T)) == 4

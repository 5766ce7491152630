"""Sampling: greedy and random choice of tokens, and the end of an answer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.sharding import initialize
from griffin.parallel.stage import build_stages
from griffin.parallel.world.grid import single_rank_grid
from griffin.tools.inference.model import LoadedModel
from griffin.tools.inference.sampling import Sampling, generate, generate_all, sample

PROBABILITIES = torch.tensor([0.05, 0.4, 0.05, 0.3, 0.2])


def draw_all(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    """Return how often each token is sampled for evenly spaced draws."""
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = sample(PROBABILITIES.log().expand(count, -1), draws, sampling)
    return chosen.bincount(minlength=len(PROBABILITIES)) / count


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"temperature": 1.0, "top_k": 2}, torch.tensor([0, 0.4, 0, 0.3, 0]) / 0.7),
        ({"temperature": 1.0, "top_k": 1}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"temperature": 1.0, "top_k": 99}, PROBABILITIES),
        ({"temperature": 1.0, "top_p": 0.69}, torch.tensor([0, 0.4, 0, 0.3, 0]) / 0.7),
        ({"temperature": 1.0, "top_p": 0.71}, torch.tensor([0, 0.4, 0, 0.3, 0.2]) / 0.9),
        ({"temperature": 1.0, "top_p": 1e-9}, torch.tensor([0, 1.0, 0, 0, 0])),
        # Among the 3 likeliest, 0.4 / 0.9 and 0.3 / 0.9 sum to 0.78.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.77}, torch.tensor([0, 0.4, 0, 0.3, 0]) / 0.7),
        ({}, torch.tensor([0, 1.0, 0, 0, 0])),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(settings: dict, expected: torch.Tensor) -> None:
    torch.testing.assert_close(draw_all(Sampling(**settings)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_a_token_without_probability_is_never_drawn(settings: dict) -> None:
    """Also for draws at both ends of [0, 1); the vocabulary's padding has no probability."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    chosen = sample(logits, ends, Sampling(temperature=1.0, **settings))
    assert set(chosen.tolist()) <= {1, 3}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "--temperature -1.0: must be 0"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"top_k": 0}, "--top-k 0: must be at least 1"),
        ({"top_p": 0.0}, "--top-p 0.0: must be above 0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_invalid_settings(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**settings)


@pytest.fixture
def model() -> Iterator[LoadedModel]:
    config = ModelConfig(
        pattern=(RECURRENT, ATTENTION),
        width=32,
        recurrent_width=32,
        heads=2,
        head_dim=16,
        gate_blocks=2,
        window=6,
        vocabulary=100,
    )
    with single_rank_grid() as grid:
        stages = build_stages(config, ParallelConfig(), grid, dtype=torch.float32, sequence=8)
        initialize(stages, grid, seed=0)
        yield LoadedModel(stages[0], grid, config)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [1, 2, 3]]
DRAWN = Sampling(temperature=1.0, top_p=0.95, seed=7)


def test_samples_depend_on_seed_and_prompt_but_not_on_the_batch(model: LoadedModel) -> None:
    def run(batch: int, sampling: Sampling) -> list[list[int]]:
        return list(generate_all(model, PROMPTS, batch=batch, max_tokens=12, stops=frozenset(), sampling=sampling))

    found = run(5, DRAWN)
    assert found == run(2, DRAWN) == run(1, DRAWN)
    assert found[0] != found[4], "the same prompt twice is drawn for twice"
    assert found != run(5, Sampling(temperature=1.0, top_p=0.95, seed=8))
    assert all(0 <= token < 100 for answer in found for token in answer)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])
    with pytest.raises(ValueError, match="logits are not finite: the weights are damaged, or need another --dtype"):
        sample(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), Sampling(temperature=temperature))


def test_the_least_temperature_takes_the_likeliest() -> None:
    chosen = sample(torch.tensor([[3.0, 5.0, 4.999]]), torch.tensor([0.999]).double(), Sampling(temperature=1e-310))
    assert chosen.tolist() == [1]


def test_an_answer_ends_with_a_stop(model: LoadedModel) -> None:
    free = generate(model, PROMPTS, max_tokens=12, sampling=DRAWN)
    assert [len(answer) for answer in free] == [12] * 5
    stop = free[2][4]
    assert any(stop not in answer for answer in free), "others go on"
    stopped = generate(model, PROMPTS, max_tokens=12, sampling=DRAWN, stops=frozenset({stop}))
    for before, after in zip(free, stopped, strict=True):
        end = before.index(stop) + 1 if stop in before else 12
        assert after == before[:end]


def test_nothing_is_computed_after_all_have_ended(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from griffin.parallel.decode import Decoder

    calls = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args: calls.append(1) or step(*args))  # type: ignore[func-returns-value]
    (answer,) = generate(model, [[1, 2]], max_tokens=12, sampling=Sampling())
    assert len(calls) == 11
    calls.clear()
    generate(model, [[1, 2]], max_tokens=12, sampling=Sampling(), stops=frozenset({answer[3]}))
    assert len(calls) == answer.index(answer[3])

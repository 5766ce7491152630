"""Decoding one token at a time equals the whole sequence, in constant memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from griffin.parallel import sharding
from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.decode import Decoder
from griffin.parallel.mixers.recurrent import RecurrentState
from griffin.parallel.stage import Stage, build_stages
from griffin.parallel.world.grid import Grid, rank_grid, single_rank_grid
from tests.ranks import RankPool

WINDOW = 8
SETTINGS: dict[str, Any] = {
    "width": 32,
    "recurrent_width": 48,
    "heads": 4,
    "head_dim": 16,
    "gate_blocks": 4,
    "window": WINDOW,
    "vocabulary": 200,  # padded to 256: tensor rank 1 of 2 holds rows of padding
    "scale_embedding": True,
    "logit_soft_cap": 30.0,
}
GRIFFIN = ModelConfig(pattern=(RECURRENT, RECURRENT, ATTENTION, RECURRENT, RECURRENT), **SETTINGS)
MIXED = ModelConfig(pattern=(GLOBAL_ATTENTION, RECURRENT, ATTENTION), **SETTINGS)
HAWK = ModelConfig(pattern=(RECURRENT, RECURRENT), **SETTINGS)
TRANSFORMER = ModelConfig(pattern=(GLOBAL_ATTENTION, GLOBAL_ATTENTION), **SETTINGS)
NEAR = ModelConfig(pattern=(ATTENTION, ATTENTION), **SETTINGS | {"window": 1})
MAX_LENGTH = 40
# Shorter than the convolution, a single token, of the window, beyond it.
LENGTHS = (2, 1, WINDOW, WINDOW + 7, 3)
TOLERANCE = 2e-5  # float32 over 5 blocks on logits up to 13, sums in another order: 5e-6 was seen


def build(model: ModelConfig, grid: Grid, dtype: torch.dtype = torch.float32) -> Stage:
    layout = ParallelConfig(tensor=grid.tensor_size)
    (stage,) = build_stages(model, layout, grid, dtype=dtype, sequence=MAX_LENGTH)
    sharding.initialize([stage], grid, seed=3)
    with torch.no_grad():
        for parameter in stage.parameters():  # biases and norms that do something
            if not parameter.any():
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
        stage.embedding.weight.mul_(4)
    return stage


def tokens(rows: int) -> Tensor:
    return torch.randint(0, SETTINGS["vocabulary"], (rows, MAX_LENGTH), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def whole(stage: Stage, ids: Tensor) -> Tensor:
    """Return this rank's shard of the logits of whole sequences, [B, T, V/t]."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    return stage({"tokens": ids, "positions": positions}).transpose(0, 1)


def assert_steps_equal(stage: Stage, lengths: tuple[int, ...], tolerance: float = TOLERANCE) -> None:
    """Compare prompts of these lengths, and then tokens up to MAX_LENGTH, with whole sequences."""
    ids = tokens(len(lengths)).to(stage.embedding.weight.device)
    expected = whole(stage, ids)
    decoder = Decoder(stage)
    rows = torch.arange(len(lengths))
    ends = torch.tensor(lengths)
    logits, state = decoder.prefill([row[:length] for row, length in zip(ids, lengths, strict=True)], MAX_LENGTH)
    size = state.nbytes
    torch.testing.assert_close(logits, expected[rows, ends - 1], rtol=0, atol=tolerance)
    for step in range(MAX_LENGTH - max(lengths)):
        logits = decoder.step(ids[rows, ends + step], state)
        torch.testing.assert_close(logits, expected[rows, ends + step], rtol=0, atol=tolerance)
        assert state.nbytes == size


MODELS = {"griffin": GRIFFIN, "mixed": MIXED, "hawk": HAWK, "transformer": TRANSFORMER, "window-1": NEAR}
PROMPTS = {"unlike": LENGTHS, "one": (5,), "alike": (WINDOW, WINDOW)}
# "mixed" has every mixer.
CASES = [
    pytest.param(
        model, prompts, id=f"{kind}-{name}", marks=[] if kind == "unlike" or name == "mixed" else pytest.mark.slow
    )
    for kind, prompts in PROMPTS.items()
    for name, model in MODELS.items()
]


@pytest.mark.parametrize(("model", "lengths"), CASES)
def test_steps_equal_the_whole_sequence(model: ModelConfig, lengths: tuple[int, ...]) -> None:
    with single_rank_grid() as grid:
        stage = build(model, grid)
        assert whole(stage, tokens(2))[..., : model.vocabulary].abs().max() > 5
        assert_steps_equal(stage, lengths)


def test_bfloat16() -> None:
    with single_rank_grid() as grid:
        # Activations are rounded to 8 bits after other sums: logits of the order of 10 then differ by some hundredths.
        assert_steps_equal(build(GRIFFIN, grid, torch.bfloat16), LENGTHS, tolerance=0.3)


def test_the_recurrence_is_kept_in_float32() -> None:
    with single_rank_grid() as grid:
        _, state = Decoder(build(HAWK, grid, torch.bfloat16)).prefill(list(tokens(2)), 2 * MAX_LENGTH)
        for block in state.blocks:
            assert isinstance(block, RecurrentState)
            assert (block.recurrence.dtype, block.window.dtype) == (torch.float32, torch.bfloat16)


def test_sequences_beyond_the_maximum_length_are_refused() -> None:
    with single_rank_grid() as grid:
        decoder = Decoder(build(TRANSFORMER, grid))
        _, state = decoder.prefill(list(tokens(1)[:, :3]), 4)
        decoder.step(torch.tensor([1]), state)
        with pytest.raises(AssertionError, match="at most 4 tokens"):
            decoder.step(torch.tensor([1]), state)


def test_size_of_the_state() -> None:
    with single_rank_grid() as grid:
        decoder = Decoder(build(GRIFFIN, grid))
        rows = 3
        recurrent = rows * SETTINGS["recurrent_width"] * (1 + 3) * 4  # the recurrence's, and three inputs
        attention = rows * WINDOW * 2 * SETTINGS["head_dim"] * 4
        for length in (1, 5, 4 * WINDOW):
            _, state = decoder.prefill(list(tokens(rows)[:, :length]), 10_000)
            assert state.nbytes == 4 * recurrent + attention + rows * 8, length


def test_prompts_do_not_see_each_other() -> None:
    """A sequence is continued the same in a batch and alone."""
    with single_rank_grid() as grid:
        decoder = Decoder(build(MIXED, grid))
        ids = tokens(len(LENGTHS))
        prompts = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]

        def run(some: list[Tensor]) -> Tensor:
            found, state = decoder.prefill(some, MAX_LENGTH)
            parts = [found]
            for step in range(20):
                parts.append(decoder.step(ids[: len(some), step], state))
            return torch.stack(parts, dim=1)

        together = run(prompts)
        changed = [*prompts[:1], *(prompt.flip(0) for prompt in prompts[1:])]
        torch.testing.assert_close(run(changed)[0], together[0], rtol=0, atol=0)
        torch.testing.assert_close(run(prompts[:1])[0], together[0], rtol=0, atol=TOLERANCE)


def sharded(ranks: Any, model: ModelConfig) -> None:
    with rank_grid(ParallelConfig(tensor=2), ranks) as grid:
        assert_steps_equal(build(model, grid), LENGTHS)


@pytest.mark.parametrize("model", [GRIFFIN, MIXED], ids=["griffin", "global-attention"])
def test_on_two_tensor_ranks(rank_pool: RankPool, model: ModelConfig) -> None:
    rank_pool.run(sharded, 2, model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    with single_rank_grid() as grid:
        # FlexAttention multiplies float32 as TF32.
        assert_steps_equal(build(GRIFFIN, grid), LENGTHS, tolerance=2e-2)

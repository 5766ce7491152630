"""Initial weights, canonical names, loading and gathering are the same on every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from griffin.parallel import sharding
from griffin.parallel.config import (
    ATTENTION,
    GLOBAL_ATTENTION,
    RECURRENT,
    ModelConfig,
    ParallelConfig,
    axis_atoms,
)
from griffin.parallel.stage import Stage, build_stages
from griffin.parallel.world.grid import Grid, rank_grid, single_rank_grid
from tests.ranks import RankPool

MODEL = ModelConfig(
    pattern=(RECURRENT, ATTENTION, GLOBAL_ATTENTION, RECURRENT),
    width=32,
    recurrent_width=48,
    heads=4,
    head_dim=8,
    gate_blocks=4,
    window=10,
    vocabulary=130,  # in memory 256 rows: over 4 ranks, the last holds padding only and the third two rows besides
)
# Name without the block's number, and global shape.
BLOCK_SHAPES = {
    "mixer_norm.weight": (32,),
    "mlp_norm.weight": (32,),
    "mlp.gate.weight": (96, 32),
    "mlp.gate.bias": (96,),
    "mlp.up.weight": (96, 32),
    "mlp.up.bias": (96,),
    "mlp.down.weight": (32, 96),
    "mlp.down.bias": (32,),
}
RECURRENT_SHAPES = {
    "recurrent.lin_x.weight": (48, 32),
    "recurrent.lin_x.bias": (48,),
    "recurrent.lin_y.weight": (48, 32),
    "recurrent.lin_y.bias": (48,),
    "recurrent.conv.weight": (4, 48),
    "recurrent.conv.bias": (48,),
    "recurrent.input_gate.weight": (4, 12, 12),
    "recurrent.input_gate.bias": (4, 12),
    "recurrent.recurrence_gate.weight": (4, 12, 12),
    "recurrent.recurrence_gate.bias": (4, 12),
    "recurrent.decay": (48,),
    "recurrent.out.weight": (32, 48),
    "recurrent.out.bias": (32,),
}
ATTENTION_SHAPES = {
    "attention.q.weight": (32, 32),
    "attention.k.weight": (8, 32),
    "attention.v.weight": (8, 32),
    "attention.out.weight": (32, 32),
    "attention.out.bias": (32,),
}
SHAPES = {"embedding.weight": (130, 32), "final_norm.weight": (32,)} | {
    f"blocks.{block}.{name}": shape
    for block, mixer in enumerate([RECURRENT_SHAPES, ATTENTION_SHAPES, ATTENTION_SHAPES, RECURRENT_SHAPES])
    for name, shape in (BLOCK_SHAPES | mixer).items()
}
DECAYED = {
    *("mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"),
    *("recurrent.lin_x.weight", "recurrent.lin_y.weight", "recurrent.conv.weight", "recurrent.out.weight"),
    *("attention.q.weight", "attention.k.weight", "attention.v.weight", "attention.out.weight"),
}

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp4": ParallelConfig(tensor=4),
    "pp2": ParallelConfig(pipeline=2, stages=(3, 1)),
    "pp2-interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2, stages=(1, 1, 1, 1)),
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2, stages=(1, 3)),
}


def build(model: ModelConfig, layout: ParallelConfig, grid: Grid, dtype: torch.dtype = torch.float32) -> list[Stage]:
    """Build stages filled with NaN, padding included."""
    stages = build_stages(model, layout, grid, dtype=dtype, sequence=16)
    for stage in stages:
        for parameter in stage.parameters():
            parameter.data.fill_(float("nan"))
    return stages


def block_part(name: str) -> str:
    """`blocks.3.mlp.up.bias` -> `mlp.up.bias`; other names as they are."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def embedding_rows(stages: list[Stage]) -> list[torch.Tensor]:
    """Return this rank's rows of the embedding table, with padding, and of the last stage's copy."""
    return [
        parameter.detach().clone()
        for stage in stages
        for parameter in stage.parameters()
        if parameter.pieces[0].name == "embedding.weight"
    ]


def draw(ranks: Any, layout: ParallelConfig) -> dict[str, Any]:
    drawn = 0

    def counted(function: Any) -> Any:
        def call(shape: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
            nonlocal drawn
            drawn += math.prod(shape)
            return function(shape, **kwargs)

        return call

    with rank_grid(layout, ranks) as grid:
        stages = build(MODEL, layout, grid)
        with (
            patch.object(torch, "randn", counted(torch.randn)),
            patch.object(torch, "rand", counted(torch.rand)),
        ):
            sharding.initialize(stages, grid, seed=3)
        parameters = [parameter for stage in stages for parameter in stage.parameters()]
        is_random = {name for name in SHAPES if not (name.endswith("bias") or "norm" in name)}
        return {
            "weights": sharding.gather(stages, grid),
            "drawn": drawn,
            "held": sum(p.numel() for p in parameters if p.pieces[0].name in is_random),
            "finite": all(p.isfinite().all() for p in parameters),
            "no_weight_decay": {piece.name: p.no_weight_decay for p in parameters for piece in p.pieces},
            "tensor_rank": grid.tensor_rank,
            "embedding": embedding_rows(stages),
        }


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    with single_rank_grid() as grid:
        yield grid


def weights(model: ModelConfig, grid: Grid, seed: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    stages = build(model, ParallelConfig(), grid, dtype)
    sharding.initialize(stages, grid, seed)
    return sharding.gather(stages, grid)


@pytest.fixture(scope="module")
def expected(grid: Grid) -> dict[str, torch.Tensor]:
    """Return the initial weights on one rank."""
    return weights(MODEL, grid)


def test_names_and_shapes(expected: dict[str, torch.Tensor]) -> None:
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == SHAPES


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_does_not_change_the_initial_weights(
    rank_pool: RankPool, expected: dict[str, torch.Tensor], name: str
) -> None:
    layout = LAYOUTS[name]
    rows = MODEL.padded_vocabulary // layout.tensor
    tables = 0
    for answer in rank_pool.run(draw, layout.model_ranks, layout):
        assert answer["weights"].keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(answer["weights"][key], value), key
        assert answer["finite"], "every element must be written"
        assert answer["drawn"] == answer["held"], "a rank draws only what it holds"
        assert answer["no_weight_decay"] == {key: block_part(key) not in DECAYED for key in answer["no_weight_decay"]}
        padded = torch.zeros(MODEL.padded_vocabulary, MODEL.width)
        padded[: MODEL.vocabulary] = expected["embedding.weight"]
        for table in answer["embedding"]:
            tables += 1
            assert torch.equal(table, padded[answer["tensor_rank"] * rows :][:rows])
    assert tables == layout.tensor * min(layout.pipeline, 2), "the first and the last stage hold the table"


def test_weight_decay_exceptions(grid: Grid) -> None:
    """No weight decay on RG-LRU parameters, embedding, norms and biases."""
    decayed = {
        piece.name
        for piece, parameter in sharding.named_pieces(build(MODEL, ParallelConfig(), grid))
        if not parameter.no_weight_decay  # type: ignore[attr-defined]
    }
    assert decayed == {name for name in SHAPES if block_part(name) in DECAYED}


def test_seed_name_and_atom_each_change_the_values(expected: dict[str, torch.Tensor], grid: Grid) -> None:
    other = weights(MODEL, grid, seed=4)
    for name, value in expected.items():
        zero = not value.any()
        assert zero == (name.endswith("bias") or "norm" in name), name
        assert torch.equal(other[name], value) == zero, name
    for part in ("recurrent.lin_x.weight", "recurrent.input_gate.weight", "recurrent.decay", "mlp.down.weight"):
        assert not torch.equal(expected[f"blocks.0.{part}"], expected[f"blocks.3.{part}"]), part
    for first, second in (("lin_x", "lin_y"), ("input_gate", "recurrence_gate")):
        name = "blocks.0.recurrent.{}.weight"
        assert not torch.equal(expected[name.format(first)], expected[name.format(second)])
    for name, atoms in {
        "embedding.weight": 130,
        "blocks.0.recurrent.input_gate.weight": 4,
        "blocks.0.recurrent.decay": 4,
        "blocks.1.attention.q.weight": 4,
    }.items():
        assert len({tuple(part.flatten().tolist()) for part in expected[name].chunk(atoms)}) == atoms, name


def test_bfloat16_weights_are_the_float32_ones_rounded(expected: dict[str, torch.Tensor], grid: Grid) -> None:
    for name, value in weights(MODEL, grid, dtype=torch.bfloat16).items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name].bfloat16()), name


@pytest.mark.parametrize("init", ["jax", "torch"])
def test_standard_deviations(grid: Grid, init: str) -> None:
    D, R, A, F, N, gate_block = 96, 160, 128, 288, 6, 20
    model = replace(
        MODEL,
        pattern=(RECURRENT, ATTENTION, GLOBAL_ATTENTION) * 2,
        width=D,
        recurrent_width=R,
        head_dim=32,
        gate_blocks=R // gate_block,
        init=init,
    )
    expected = {
        "embedding.weight": 1 / math.sqrt(D),
        "recurrent.lin_x.weight": 1 / math.sqrt(D),
        "recurrent.lin_y.weight": 1 / math.sqrt(D),
        "recurrent.conv.weight": math.sqrt(0.01 / 4),
        "recurrent.input_gate.weight": 1 / math.sqrt(R if init == "jax" else gate_block),
        "recurrent.recurrence_gate.weight": 1 / math.sqrt(R if init == "jax" else gate_block),
        "recurrent.out.weight": math.sqrt(2 / N / R),
        "attention.q.weight": 1 / math.sqrt(D),
        "attention.k.weight": 1 / math.sqrt(D),
        "attention.v.weight": 1 / math.sqrt(D),
        "attention.out.weight": math.sqrt(2 / N / A),
        "mlp.gate.weight": 1 / math.sqrt(2 * D if init == "jax" else D),
        "mlp.up.weight": 1 / math.sqrt(2 * D if init == "jax" else D),
        "mlp.down.weight": math.sqrt(2 / N / F),
    }
    found = set()
    for name, value in weights(model, grid).items():
        part = block_part(name)
        if part.endswith("bias") or "norm" in part:
            assert not value.any(), name
        elif part != "recurrent.decay":
            found.add(part)
            std, n = expected[part], value.numel()
            # Five standard errors of a normal sample's standard deviation and mean; n is 640 at least.
            assert value.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
            assert abs(value.mean().item()) < 5 * std / math.sqrt(n), name
    assert found == set(expected)


def decay_places(p: torch.Tensor) -> torch.Tensor:
    """Return the relative positions of the squared decays in their range, from 0 to 1, sorted."""
    a = torch.exp(-torch.nn.functional.softplus(p.double()))
    return (a.square().sort().values - 0.9**2) / (0.999**2 - 0.9**2)


def test_decay_is_uniform_in_its_square(expected: dict[str, torch.Tensor], grid: Grid) -> None:
    pieces = {piece.name: piece for piece, _ in sharding.named_pieces(build(MODEL, ParallelConfig(), grid))}
    n = 1 << 18
    drawn = pieces["blocks.0.recurrent.decay"].init((n,), torch.Generator().manual_seed(5))
    places = decay_places(drawn)
    assert places[0] > -1e-6  # rounding of p to float32
    assert places[-1] < 1 + 1e-6
    # Kolmogorov-Smirnov: a uniform sample is within 1.95 / sqrt(n) = 0.004 with probability 0.999. Were the decay
    # itself uniform, its square would be 0.013 off.
    assert (places - torch.linspace(0, 1, n, dtype=torch.float64)).abs().max() < 1.95 / math.sqrt(n)
    for block in (0, 3):
        places = decay_places(expected[f"blocks.{block}.recurrent.decay"])
        assert places[0] > -1e-6
        assert places[-1] < 1 + 1e-6
        assert places[-1] - places[0] > 0.8


def random_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def load_and_gather(ranks: Any, layout: ParallelConfig) -> dict[str, Any]:
    with rank_grid(layout, ranks) as grid:
        stages = build(MODEL, layout, grid)
        sharding.load(stages, grid, random_tensors())
        return {
            "weights": sharding.gather(stages, grid),
            "doubled": sharding.gather(stages, grid, lambda parameter: 2 * parameter.detach()),
            "tensor_rank": grid.tensor_rank,
            "embedding": embedding_rows(stages),
        }


@pytest.mark.parametrize("name", ["tp1", *LAYOUTS])
def test_gather_returns_what_was_loaded(rank_pool: RankPool, name: str) -> None:
    layout = LAYOUTS.get(name, ParallelConfig())
    rows = MODEL.padded_vocabulary // layout.tensor
    tensors = random_tensors()
    padded = torch.zeros(MODEL.padded_vocabulary, MODEL.width)
    padded[: MODEL.vocabulary] = tensors["embedding.weight"]
    for answer in rank_pool.run(load_and_gather, layout.model_ranks, layout):
        assert answer["weights"].keys() == answer["doubled"].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(answer["weights"][key], value), key
            assert torch.equal(answer["doubled"][key], 2 * value), key
        for table in answer["embedding"]:
            assert torch.equal(table, padded[answer["tensor_rank"] * rows :][:rows])


def test_load_rounds_to_the_dtype_of_the_parameters(grid: Grid) -> None:
    stages = build(MODEL, ParallelConfig(), grid, torch.bfloat16)
    sharding.load(stages, grid, random_tensors())
    for name, value in sharding.gather(stages, grid).items():
        assert torch.equal(value, random_tensors()[name].bfloat16()), name


def test_load_refuses_unknown_names_and_other_shapes(grid: Grid) -> None:
    stages = build(MODEL, ParallelConfig(), grid)
    name = "blocks.1.attention.k.weight"
    with pytest.raises(ValueError, match=rf"^{name}: must be a tensor of shape \(8, 32\), found none$"):
        sharding.load(stages, grid, {key: value for key, value in random_tensors().items() if key != name})
    with pytest.raises(ValueError, match=rf"^{name}: must be a tensor of shape \(8, 32\), found \(32, 8\)$"):
        sharding.load(stages, grid, random_tensors() | {name: torch.zeros(32, 8)})
    with pytest.raises(ValueError, match=r"^embedding.weight: must be .*\(130, 32\), found \(256, 32\)$"):
        sharding.load(stages, grid, random_tensors() | {"embedding.weight": torch.zeros(256, 32)})
    with pytest.raises(ValueError, match=r"^no parameter is called blocks.4.mlp.up.bias, head.weight$"):
        sharding.load(
            stages, grid, random_tensors() | {"head.weight": torch.zeros(1), "blocks.4.mlp.up.bias": torch.zeros(96)}
        )


def test_axis_atoms() -> None:
    """A supported tensor size divides the number of atoms if and only if it divides the axis."""
    for size in range(1, 1500):
        atoms = axis_atoms(size)
        assert size % atoms == 0
        for tensor in (*range(1, 9), 10, 12, 14, 15, 16, 20, 32, 64):
            assert (atoms % tensor == 0) == (size % tensor == 0), (size, tensor)

"""Outputs of a stage, activation recomputation, and the blocks of each pipeline rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from griffin.parallel import megatron_device, sharding
from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECOMPUTES, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.context import Context, megatron_config
from griffin.parallel.stage import Stage, build_stages, meta_stage
from griffin.parallel.world.grid import Grid, rank_grid, single_rank_grid
from tests.ranks import RankPool

T, B = 20, 2
MODEL = ModelConfig(
    pattern=(RECURRENT, ATTENTION, GLOBAL_ATTENTION, RECURRENT),
    width=40,
    recurrent_width=48,
    heads=4,
    head_dim=8,
    gate_blocks=4,
    window=6,
    vocabulary=130,  # in memory 256 rows: over 4 ranks, the last holds padding only
)
V, PADDED = 130, 256
SCALE_OF_40 = 6.3125  # sqrt(40) = 6.3246 in bfloat16, whose numbers are 1/32 apart between 4 and 8


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    with single_rank_grid() as grid:
        yield grid


def make_stage(
    grid: Grid, model: ModelConfig = MODEL, dtype: torch.dtype = torch.float32, recompute: str = "none"
) -> Stage:
    (stage,) = build_stages(model, ParallelConfig(), grid, dtype=dtype, sequence=T, recompute=recompute)
    sharding.initialize([stage], grid, seed=1)
    return stage


def batch(*, labels: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "tokens": torch.randint(V, (B, T), generator=generator),
        "labels": torch.randint(V, (B, T), generator=generator),
        "positions": torch.arange(T).expand(B, T) % 11,
    }
    if not labels:
        del tensors["labels"]
    return tensors


def gradients(stage: Stage) -> dict[str, Tensor]:
    found = {}
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_without_and_with_labels(grid: Grid, dtype: torch.dtype) -> None:
    stage = make_stage(grid, dtype=dtype)
    logits = stage(batch(labels=False))
    assert (logits.shape, logits.dtype) == ((T, B, PADDED), torch.float32)
    assert logits[..., :V].isfinite().all()
    assert (logits[..., V:] == float("-inf")).all()
    total, losses = stage(batch(labels=True))
    assert (losses.shape, losses.dtype) == ((T, B), torch.float32)
    labels = batch(labels=True)["labels"].t()
    expected = F.cross_entropy(logits[..., :V].flatten(0, 1), labels.flatten(), reduction="none").view(T, B)
    # In float32, the log of a sum over 130 in another order. The loss does not round its logits to bfloat16 on CPUs.
    largest = logits[..., :V].abs().max().item()
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 2**-8 * largest)
    torch.testing.assert_close(total, losses.sum())
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3))
    total, unmasked = stage(batch(labels=True) | {"loss_mask": mask})
    torch.testing.assert_close(total, (losses * mask.t()).sum())
    assert torch.equal(unmasked, losses)


def test_gradients_are_those_of_cross_entropy(grid: Grid) -> None:
    """Compared with PyTorch's cross entropy, so that the padding's -inf cannot corrupt a gradient unnoticed."""
    stage, expected = make_stage(grid), make_stage(grid)
    stage(batch(labels=True)).total.backward()
    logits = expected(batch(labels=False))[..., :V]
    F.cross_entropy(logits.flatten(0, 1), batch(labels=True)["labels"].t().flatten(), reduction="sum").backward()
    for name, gradient in gradients(stage).items():
        reference = gradients(expected)[name]
        scale = reference.abs().max().item()
        assert scale > 0, name
        # float32 softmax by another formula, relative to the largest element.
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-5 * scale)
    assert stage.embedding.weight.grad is not None
    assert not stage.embedding.weight.grad[V:].any(), "padding has no gradient"


def test_soft_cap(grid: Grid) -> None:
    capped, plain = make_stage(grid, replace(MODEL, logit_soft_cap=3.0)), make_stage(grid)
    with torch.no_grad():
        for stage in (capped, plain):
            stage.final_norm.weight.fill_(9.0)  # logits ten times as large
        actual, uncapped = capped(batch(labels=False)), plain(batch(labels=False))
    assert uncapped[..., :V].abs().max() > 6
    assert actual[..., :V].abs().max() <= 3.0
    assert (actual[..., V:] == float("-inf")).all()
    torch.testing.assert_close(actual[..., :V], 3 * torch.tanh(uncapped[..., :V] / 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_embedding_scale_is_rounded_to_bfloat16(grid: Grid, dtype: torch.dtype, scaled: bool) -> None:
    model = replace(MODEL, scale_embedding=scaled)
    megatron = megatron_config(model, ParallelConfig(), dtype, grid.device)
    context = Context(model=model, grid=grid, megatron=megatron, device=grid.device)
    stage = Stage(context, 0, 0, is_first=True, is_last=False)  # no blocks: its output is the embedding
    sharding.initialize([stage], grid, seed=1)
    x = stage(batch(labels=False))
    rows = stage.embedding.weight[batch(labels=False)["tokens"].t()]
    assert (x.shape, x.dtype) == ((T, B, 40), dtype)
    assert torch.equal(x, rows * SCALE_OF_40 if scaled else rows)
    assert math.sqrt(40) != SCALE_OF_40


def test_bfloat16_trains_like_float32(grid: Grid) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        stage = make_stage(grid, dtype=dtype)
        total, losses = stage(batch(labels=True))
        (total / (B * T)).backward()
        assert all(parameter.dtype == dtype for parameter in stage.parameters())
        found[dtype] = losses.mean().item(), gradients(stage)
    (loss, reference), (rounded_loss, rounded) = found[torch.float32], found[torch.bfloat16]
    # bfloat16 keeps 8 bits, 0.4 % a rounding, of which a few dozen add up: 1e-4 of the loss and 0.999 were seen.
    assert rounded_loss == pytest.approx(loss, rel=2e-3)
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.bfloat16
        similarity = F.cosine_similarity(gradient.float().flatten(), reference[name].flatten(), dim=0).item()
        assert similarity > 0.99, (name, similarity)


def run(grid: Grid, recompute: str, *, training: bool = True) -> dict[str, Any]:
    """Run a forward and a backward pass; return loss, gradients, calls per kind of module, and saved bytes."""
    stage = make_stage(grid, recompute=recompute).train(training)
    calls: Counter[str] = Counter()
    for block in stage.blocks:
        for name in ("mixer_norm", "mixer", "mlp_norm", "mlp"):
            module = getattr(block, name)
            # Before, since recomputation stops as soon as it has what it needs.
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, losses = stage(batch(labels=True))
    total.backward()
    return {"losses": losses, "gradients": gradients(stage), "calls": calls, "kept": sum(kept.values())}


PARTS = {"mixer": ("mixer_norm", "mixer"), "mlp": ("mlp_norm", "mlp")}


@pytest.fixture(scope="module")
def passes(grid: Grid) -> dict[str, dict[str, Any]]:
    """A forward and backward pass of each kind of recomputation."""
    return {recompute: run(grid, recompute) for recompute in RECOMPUTES}


@pytest.mark.parametrize("recompute", [name for name in RECOMPUTES if name != "none"])
def test_recomputation_changes_only_memory(grid: Grid, passes: dict[str, dict[str, Any]], recompute: str) -> None:
    kept, again = passes["none"], passes[recompute]
    assert torch.equal(kept["losses"], again["losses"])
    assert kept["gradients"].keys() == again["gradients"].keys()
    for name, gradient in kept["gradients"].items():
        assert torch.equal(gradient, again["gradients"][name]), name
    assert set(kept["calls"].values()) == {MODEL.blocks}
    twice = {"gather": (), "states": (), "norms+gelu": (), "block": (*PARTS["mixer"], *PARTS["mlp"]), **PARTS}[
        recompute
    ]
    assert again["calls"] == {
        name: MODEL.blocks * (2 if name in twice else 1) for part in PARTS.values() for name in part
    }
    assert run(grid, recompute, training=False)["calls"] == kept["calls"], "evaluation keeps nothing to save"


def test_recomputation_saves_memory(passes: dict[str, dict[str, Any]]) -> None:
    kept = {recompute: found["kept"] for recompute, found in passes.items()}
    assert kept["block"] < kept["mixer"] < kept["none"]
    assert kept["block"] < kept["mlp"] < kept["none"]
    assert kept["gather"] == kept["none"], "without sequence parallelism nothing is gathered"
    # The inputs of the mixer and of both linears of the MLP.
    assert kept["none"] - kept["norms+gelu"] == MODEL.blocks * T * B * (2 * MODEL.width + MODEL.mlp_width) * 4
    recurrences = MODEL.pattern.count("recurrent")
    assert kept["none"] - kept["states"] == recurrences * T * B * MODEL.recurrent_width * 4
    # What is left of a block is its input, and of the stage the embedding, the final norm and the loss's gradients.
    inputs = MODEL.blocks * T * B * MODEL.width * 4
    assert kept["block"] - inputs < kept["none"] / 4


def tensor_parallel(ranks: Any, tensor: int) -> dict[str, Any]:
    layout = ParallelConfig(tensor=tensor)
    with rank_grid(layout, ranks) as grid:
        (stage,) = build_stages(MODEL, layout, grid, dtype=torch.float32, sequence=T)
        sharding.initialize([stage], grid, seed=1)
        logits = stage(batch(labels=False)).detach()
        total, losses = stage(batch(labels=True))
        total.backward()
        assert stage.embedding.weight.grad is not None
        return {
            "logits": logits,
            "losses": losses,
            "finite": all(gradient.isfinite().all() for gradient in gradients(stage).values()),
            "embedding": stage.embedding.weight.grad,
        }


def test_a_rank_that_holds_only_padding(rank_pool: RankPool, grid: Grid) -> None:
    answers = rank_pool.run(tensor_parallel, 4, 4)
    stage = make_stage(grid)
    logits = stage(batch(labels=False)).detach()
    total, losses = stage(batch(labels=True))
    total.backward()
    assert stage.embedding.weight.grad is not None
    found = torch.cat([answer["logits"] for answer in answers], dim=-1)
    assert (answers[3]["logits"] == float("-inf")).all()
    assert (found[..., V:] == float("-inf")).all()
    # float32 sums in another order.
    torch.testing.assert_close(found[..., :V], logits[..., :V], rtol=0, atol=1e-5)
    gradient = torch.cat([answer["embedding"] for answer in answers])
    largest = stage.embedding.weight.grad.abs().max().item()  # 2e-6 of it was seen
    torch.testing.assert_close(gradient, stage.embedding.weight.grad, rtol=0, atol=1e-5 * largest)
    assert not gradient[V:].any()
    for answer in answers:
        torch.testing.assert_close(answer["losses"], losses, rtol=1e-5, atol=0)
        assert answer["finite"]


def held_blocks(ranks: Any, layout: ParallelConfig) -> list[dict[str, Any]]:
    model = replace(MODEL, pattern=(RECURRENT,) * 6)
    with rank_grid(layout, ranks) as grid:
        return [
            {
                "blocks": sorted({int(name.split(".")[1]) for name in names if name.startswith("blocks.")}),
                "embedding": stage.pre_process,
                "logits": stage.post_process,
                "owns": {name for name in names if not name.startswith("blocks.")},
                "shared": stage.shared_embedding_or_output_weight() is not None,
            }
            for stage in build_stages(model, layout, grid, dtype=torch.float32, sequence=T)
            for names in [{piece.name for piece, _ in sharding.named_pieces([stage])}]
        ]


def test_stages_of_an_interleaved_pipeline(rank_pool: RankPool) -> None:
    layout = ParallelConfig(pipeline=2, virtual_pipeline=2, stages=(1, 2, 1, 2))
    first, second = rank_pool.run(held_blocks, 2, layout)
    assert [stage["blocks"] for stage in first] == [[0], [3]]
    assert [stage["blocks"] for stage in second] == [[1, 2], [4, 5]]
    assert [stage["owns"] for stage in first] == [{"embedding.weight"}, set()]
    assert [stage["owns"] for stage in second] == [set(), {"final_norm.weight"}]
    assert [(stage["embedding"], stage["logits"]) for stage in first] == [(True, False), (False, False)]
    assert [(stage["embedding"], stage["logits"]) for stage in second] == [(False, False), (False, True)]
    assert [stage["shared"] for stage in (*first, *second)] == [True, False, False, True]


def test_meta_stage_allocates_no_memory(grid: Grid) -> None:
    before = [module.torch for module in megatron_device.MODULES]
    stage = meta_stage(replace(MODEL, pattern=MODEL.pattern * 25, width=40_000), grid)
    assert len(stage.blocks) == 100
    assert all(parameter.is_meta for parameter in stage.parameters())
    assert [module.torch for module in megatron_device.MODULES] == before

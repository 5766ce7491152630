"""The loss over tensor ranks against PyTorch's in float64, the tied table's gradient in training, and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from griffin.kernels import linear_cross_entropy
from griffin.kernels.linear_cross_entropy import terms
from griffin.parallel import sharding
from griffin.parallel.config import ParallelConfig
from griffin.parallel.context import Context, megatron_config
from griffin.parallel.layers.loss import vocabulary_loss
from griffin.parallel.stage import build_stages
from griffin.parallel.world.grid import rank_grid
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training
from tests.layouts import SEQUENCE, VOCABULARY, main_gradient, make_config, micro_batches
from tests.ranks import RankPool

T, B, D, PADDED, Z_LOSS, SOFT_CAP = 8, 3, 5, 256, 0.1, 2.0


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(T, B, generator=generator, dtype=torch.float64)
    weights[2:4] = 0
    return {
        "x": torch.randn(T, B, D, generator=generator, dtype=torch.float64),
        "table": torch.randn(PADDED, D, generator=generator, dtype=torch.float64),
        "labels": torch.randint(VOCABULARY, (T, B), generator=generator),
        "weights": weights,
    }


def expected_results() -> dict[str, Tensor]:
    given = inputs()
    x, table = given["x"].requires_grad_(), given["table"].requires_grad_()
    logits = SOFT_CAP * torch.tanh(x @ table[:VOCABULARY].t() / SOFT_CAP)
    tokens = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), reduction="none").view(T, B)
    total = (given["weights"] * (tokens + Z_LOSS * logits.logsumexp(-1) ** 2)).sum()
    grad_x, grad_table = torch.autograd.grad(3 * total, (x, table))
    return {"total": total.detach(), "tokens": tokens.detach(), "x": grad_x, "table": grad_table}


def loss_of_a_rank(ranks: Any, layout: ParallelConfig, main_grad: bool) -> dict[str, Tensor]:
    """With the gradients of this rank's part of x and of its rows of the table."""
    model = make_config("hawk", layout).model
    given, size = inputs(), PADDED // layout.tensor
    with rank_grid(layout, ranks) as grid, mock.patch.object(linear_cross_entropy, "chunk_tokens", return_value=7):
        context = Context(
            model=replace(model, logit_soft_cap=SOFT_CAP),
            grid=grid,
            megatron=megatron_config(model, layout, torch.float32, grid.device),
            device=grid.device,
            z_loss=Z_LOSS,
        )
        x, first = given["x"], grid.tensor_rank * size
        if layout.sequence_parallel:
            x = x.chunk(layout.tensor)[grid.tensor_rank]
        x = x.clone().requires_grad_()
        table = nn.Parameter(given["table"][first : first + size].clone())
        if main_grad:
            table.main_grad = torch.ones_like(table, dtype=torch.float32)  # type: ignore[attr-defined]
        valid = min(max(VOCABULARY - first, 0), size)
        total, tokens = vocabulary_loss(
            x, table, given["labels"], given["weights"], context, valid=valid, is_embedding=True
        )
        (3 * total).backward()
        assert x.grad is not None
        gradient = table.main_grad - 1 if main_grad else table.grad  # type: ignore[attr-defined]
        assert (table.grad is None) == main_grad
        assert gradient is not None
        return {"total": total.detach(), "tokens": tokens, "x": x.grad, "table": gradient}


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "main_grad"),
    [(1, False, False), (2, False, True), (2, True, False), (4, False, False), (4, True, True)],
)
def test_equals_float64(rank_pool: RankPool, tensor: int, sequence_parallel: bool, main_grad: bool) -> None:
    """The vocabulary ends within the rows of rank 2 of 4; labels are among those of every rank before."""
    expected = expected_results()
    layout = ParallelConfig(tensor=tensor, sequence_parallel=sequence_parallel)
    answers = rank_pool.run(loss_of_a_rank, tensor, layout, main_grad)
    gradients = {
        "x": torch.cat([answer["x"] for answer in answers]) if sequence_parallel else answers[0]["x"],
        "table": torch.cat([answer["table"] for answer in answers]),
    }
    for answer in answers:
        for name, value in (answer | gradients).items():
            if name == "x" and not sequence_parallel:
                value = answer[name]
            # `main_grad` is float32.
            tolerance = 1e-6 if name == "table" and main_grad else 1e-12
            torch.testing.assert_close(
                value.double(), expected[name], rtol=0, atol=tolerance * expected[name].abs().max().item()
            )


def tied_gradient(ranks: Any, config: Config) -> dict[str, Any]:
    """Mean loss, and the gradient of the rows of the table that this rank updates, with the place of the first."""
    with rank_grid(config.parallel, ranks) as grid:
        training = Training(config, grid)
        loss, _ = training.gradients(iter(micro_batches(config, 0, grid.data_rank, grid.data_size)))
        for stage in training.stages:
            table = stage.shared_embedding_or_output_weight()
            if table is not None:
                begin, end = training.optimizer.shard_range(table)
                return {"loss": loss, "begin": begin, "gradient": main_gradient(table).flatten()[begin:end].clone()}
        return {"loss": loss, "begin": 0, "gradient": torch.empty(0)}


def autograd_gradient(ranks: Any, config: Config, z_loss: float) -> dict[str, Any]:
    """The same for the whole table by PyTorch's cross-entropy of all logits, on one rank."""
    with rank_grid(config.parallel, ranks) as grid:
        (stage,) = build_stages(config.model, config.parallel, grid, dtype=torch.float32, sequence=SEQUENCE)
        sharding.initialize([stage], grid, config.train.seed)
        batches = micro_batches(config, 0, 0, 1)
        number = sum(float(batch["loss_mask"].sum()) for batch in batches)
        mean = 0.0
        for batch in batches:
            logits = stage({name: value for name, value in batch.items() if name != "labels"})[..., :VOCABULARY]
            losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].t().flatten(), reduction="none")
            weights = batch["loss_mask"].t().flatten() / number
            squares = logits.flatten(0, 1).logsumexp(-1) ** 2
            (weights * (losses + z_loss * squares)).sum().backward()
            mean += float((weights * losses).sum())
        assert stage.embedding.weight.grad is not None
        return {"loss": mean, "gradient": stage.embedding.weight.grad.flatten()}


@pytest.fixture(scope="module")
def by_autograd(rank_pool: RankPool) -> dict[float, dict[str, Any]]:
    config = make_config("hawk", ParallelConfig())
    return {z_loss: rank_pool.run(autograd_gradient, 1, config, z_loss)[0] for z_loss in (0.0, 0.1)}


LAYOUTS = {
    "one": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "pp2-dp2": (4, ParallelConfig(pipeline=2)),
    "pp2-interleaved-dp2": (4, ParallelConfig(pipeline=2, virtual_pipeline=2, stages=(1, 2, 1, 1))),
}


@pytest.mark.parametrize(
    ("name", "overlap", "z_loss"),
    [
        ("one", "off", 0.1),
        ("dp2", "on", 0.0),
        ("pp2", "off", 0.0),
        ("pp2-dp2", "off", 0.1),
        ("pp2-dp2", "on", 0.0),
        ("pp2-interleaved-dp2", "on", 0.1),
    ],
)
def test_the_tied_table_gets_both_gradients(
    rank_pool: RankPool, by_autograd: dict[float, dict[str, Any]], name: str, overlap: str, z_loss: float
) -> None:
    """That of the embedding and that of the loss, over all micro-batches; reported losses are without z-loss."""
    expected = by_autograd[z_loss]
    world_size, layout = LAYOUTS[name]
    config = make_config("hawk", layout, overlap=overlap, z_loss=z_loss)
    largest = expected["gradient"].abs().max().item()
    covered = 0
    for answer in rank_pool.run(tied_gradient, world_size, config):
        assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        gradient, begin = answer["gradient"], answer["begin"]
        # float32 sums in another order, relative to the largest element.
        part = expected["gradient"][begin : begin + len(gradient)]
        torch.testing.assert_close(gradient, part, rtol=0, atol=1e-5 * largest)
        covered += len(gradient)
    assert covered >= len(expected["gradient"])


MEMORY = """
import sys, torch
from griffin.kernels.linear_cross_entropy import linear_cross_entropy

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

tokens, rows, width = map(int, sys.argv[1:])
hidden = torch.randn(tokens, width).requires_grad_()
table = torch.randn(rows, width).requires_grad_()
table.main_grad = torch.zeros(rows, width)
labels = torch.arange(tokens)

def loss(n):
    linear_cross_entropy(hidden[:n], table, labels[:n], soft_cap=30.0, main_grad=table.main_grad)[0].backward()

before = kilobytes("VmRSS")
loss(tokens)
print(1024 * (kilobytes("VmHWM") - before))
"""


def peak(tokens: int, rows: int, width: int) -> int:
    """Bytes that the loss adds, above hidden states, table and their gradients."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, *map(str, (tokens, rows, width))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize(
    ("tokens", "rows", "width"),
    [(512, 64_000, 8), pytest.param(4096, 256_000, 128, marks=pytest.mark.slow)],
)
def test_memory_at_the_peak(tokens: int, rows: int, width: int) -> None:
    """A tenth of what the logits of all tokens alone would take, in float32, once."""
    chunk = terms.chunk_tokens(rows, torch.float32, on_cpu=True) * rows * 4
    table = rows * width * 4
    found = peak(tokens, rows, width)
    assert found <= chunk + 3 * table + 60e6, f"{found / 1e6:.0f} MB"
    if tokens == 4096:
        assert found <= 0.1 * tokens * rows * 4, f"{found / 1e6:.0f} MB"

"""Communication of each block over tensor ranks: number and bytes of collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from griffin.kernels.recurrent_block import recurrent_block
from griffin.parallel.block import residual_sum
from griffin.parallel.config import ParallelConfig
from griffin.parallel.context import Context, Documents, megatron_config
from griffin.parallel.layers.mlp import MLP
from griffin.parallel.mixers.attention import AttentionMixer
from griffin.parallel.mixers.recurrent import BlockDiagonalGates, RecurrentMixer
from griffin.parallel.sharding import initialize
from griffin.parallel.world.grid import rank_grid
from griffin.trainer.step import Training
from tests.layouts import make_config, micro_batches
from tests.ranks import RankPool

T, B = 32, 2
MODEL = make_config("griffin", ParallelConfig()).model
ACTIVATIONS = T * B * MODEL.width * 4  # bytes of [T, B, D] in float32

ALL_REDUCE = ("allreduce_", ACTIVATIONS)
ALL_GATHER = ("_allgather_base_", ACTIVATIONS)
REDUCE_SCATTER = ("_reduce_scatter_base_", ACTIVATIONS)
EXPECTED = {
    "plain": {"forward": [ALL_REDUCE], "backward": [ALL_REDUCE]},
    # Backward: the output's gradient is gathered, and the input's gradient is reduced and scattered.
    "sequence-parallel": {"forward": [ALL_GATHER, REDUCE_SCATTER], "backward": [ALL_GATHER, REDUCE_SCATTER]},
    # The input is gathered again (only its shard was kept).
    "sequence-parallel, gathers again": {
        "forward": [ALL_GATHER, REDUCE_SCATTER],
        "backward": [ALL_GATHER, ALL_GATHER, REDUCE_SCATTER],
    },
}


class CountCollectives(TorchDispatchMode):
    """Records (operation, bytes of the larger of its input and output) of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.seen.append((name, max(sizes)))
        return func(*args, **(kwargs or {}))


def count_branches(ranks: Any, sequence_parallel: bool, keep_gathered: bool) -> dict[str, Any]:
    layout = ParallelConfig(tensor=2, sequence_parallel=sequence_parallel)
    with rank_grid(layout, ranks) as grid:
        context = Context(
            model=MODEL,
            grid=grid,
            megatron=megatron_config(MODEL, layout, torch.float32, grid.device),
            device=grid.device,
            keep_gathered=keep_gathered,
        )
        documents = Documents(torch.arange(T).expand(B, T).contiguous() % 13)
        branches = {
            "mlp": (MLP("m", context), ()),
            "recurrent": (RecurrentMixer("r", context), (documents,)),
            "attention": (AttentionMixer("a", context, 10), (documents,)),
            "global attention": (AttentionMixer("g", context, None), (documents,)),
        }
        seen: dict[str, Any] = {}
        for name, (branch, arguments) in branches.items():
            initialize([branch], grid, seed=0)
            x = torch.randn(T // (2 if sequence_parallel else 1), B, MODEL.width, requires_grad=True)
            with CountCollectives() as forward:
                output = branch(x, *arguments)
            with CountCollectives() as backward:
                residual_sum(torch.zeros_like(x), output).sum().backward()
            seen[name] = {"forward": forward.seen, "backward": backward.seen}
        seen["inside"] = _inside_recurrence(context, documents)
        return seen


def _inside_recurrence(context: Context, documents: Documents) -> list[tuple[str, int]]:
    width = MODEL.recurrent_width // context.grid.tensor_size
    gates = BlockDiagonalGates("r", context)
    initialize([gates], context.grid, seed=0)
    xy = torch.randn(T, B, 2 * width, requires_grad=True)
    with CountCollectives() as count:
        weights = (torch.randn(4, width), torch.randn(width), gates.weight, gates.bias.view(2, -1), torch.randn(width))
        y, _ = recurrent_block(xy, *weights, starts=documents.starts)
        y.sum().backward()
    assert xy.grad is not None
    return count.seen


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_branch_communicates_as_much_as_an_mlp(rank_pool: RankPool, kind: str) -> None:
    for seen in rank_pool.run(count_branches, 2, kind != "plain", kind == "sequence-parallel"):
        assert seen.pop("inside") == [], "convolution, gates and recurrence must not communicate"
        for name, counted in seen.items():
            assert counted == EXPECTED[kind], name


def count_step(ranks: Any, sequence_parallel: bool) -> list[tuple[str, int]]:
    layout = ParallelConfig(tensor=2, sequence_parallel=sequence_parallel)
    config = make_config("griffin", layout)
    # Four micro-batches: what happens once per step and once per micro-batch can be told apart.
    assert config.train.global_batch == 4 * config.train.micro_batch
    with rank_grid(layout, ranks) as grid:
        training = Training(config, grid)
        data = micro_batches(config, 0, 0, 1)
        with CountCollectives() as count:
            training.gradients(iter(data))
        return count.seen


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence-parallel"])
def test_key_value_gradients_are_summed_once_per_step(rank_pool: RankPool, sequence_parallel: bool) -> None:
    attention_blocks = MODEL.pattern.count("attention")
    size = attention_blocks * 2 * MODEL.head_dim * MODEL.width * 4
    for seen in rank_pool.run(count_step, 2, sequence_parallel):
        assert seen.count(("allreduce_", size)) == 1

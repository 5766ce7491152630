"""Cost model of blocks, for the reported FLOP/s and for the split of a model over pipeline stages.

Forward FLOPs per token count two per multiply-add of matrix products and nothing else (the convention of the PaLM
paper, arXiv 2204.02311, appendix B). A training step is three times that; recomputation is not counted:

    mixer                `cost` of its class
    MLP                  2 (3 D F)
    logits               2 D V

Recurrences are memory-bound, so the stage split also counts bytes moved outside matrix products: a third of those of
a forward and backward pass, as `griffin bench count` records them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from griffin.parallel.config import ModelConfig
from griffin.parallel.mixers import MIXERS
from griffin.parallel.mixers.base import Cost


def block_cost(model: ModelConfig, mixer: str, sequence: int) -> Cost:
    """Return the cost of a residual block: norms, temporal mixer and MLP."""
    # Two norms, each with a residual sum: two tensors read and two written forward, three and one backward.
    norms = Cost(0.0, 2 * 16.0 / 3 * model.width)
    # Gated GeLU: gate and up are read and the result written; backward these and a gradient are read, theirs written.
    mlp = Cost(2.0 * 3 * model.width * model.mlp_width, 16.0 / 3 * model.mlp_width)
    return norms + MIXERS[mixer].load().cost(model, sequence) + mlp


def embedding_cost(model: ModelConfig) -> Cost:
    # Forward rows are copied; backward their gradient is converted to float32 and added to a float32 sum.
    return Cost(0.0, 26.0 / 3 * model.width)


def logits_cost(model: ModelConfig) -> Cost:
    # Logits are read once, and overwritten by their gradient.
    return Cost(2.0 * model.width * model.vocabulary, 6.0 / 3 * model.vocabulary)


def train_flops_per_token(model: ModelConfig, sequence: int) -> float:
    """Return the model FLOPs per token of a training step (forward and backward)."""
    blocks = sum(block_cost(model, mixer, sequence).flops for mixer in model.pattern)
    return 3.0 * (blocks + logits_cost(model).flops)


def split_blocks(model: ModelConfig, stages: int, sequence: int) -> tuple[int, ...]:
    """Return the blocks of each stage in model order that minimise the time of the slowest stage.

    The embedding counts towards the first stage and the logits towards the last. Every stage has at least one block.
    """
    if stages == 1:  # also called by tools that do without torch, which the mixers' costs import
        return (model.blocks,)
    blocks = [block_cost(model, mixer, sequence).time for mixer in model.pattern]
    return _split(tuple(blocks), embedding_cost(model).time, logits_cost(model).time, stages)


def _split(blocks: Sequence[float], first: float, last: float, stages: int) -> tuple[int, ...]:
    total = len(blocks)
    assert 1 <= stages <= total, (stages, total)
    until = [0.0]
    for cost in blocks:
        until.append(until[-1] + cost)

    @cache
    def best(stage: int, start: int) -> tuple[float, float, tuple[int, ...]]:
        """Return (slowest stage, sum of squares, sizes) for stages from `stage` on with the blocks from `start` on.

        The sum of squares breaks ties in favour of even splits.
        """
        ends = [total] if stage == stages - 1 else range(start + 1, total - (stages - stage - 1) + 1)
        found = []
        for end in ends:
            cost = until[end] - until[start] + (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
            rest = best(stage + 1, end) if stage < stages - 1 else (0.0, 0.0, ())
            found.append((max(cost, rest[0]), cost**2 + rest[1], (end - start, *rest[2])))
        return min(found)

    return best(0, 0)[2]

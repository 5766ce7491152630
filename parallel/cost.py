"""What a block costs: one estimate for the reported FLOP/s and for the split of a model over pipeline stages.

Forward floating-point operations per token count every matrix product twice its multiply-adds (the convention of the
PaLM paper, arXiv 2204.02311, appendix B) and nothing else; a training step is three times that, recomputation not
counted:

    mixer                as its class says (`cost`)
    MLP                  2 (3 D F)
    logits               2 D V

A recurrence is bound by memory traffic, so that the stage split adds bytes moved outside matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from griffin.parallel.config import ModelConfig
from griffin.parallel.mixers import MIXERS
from griffin.parallel.mixers.base import Cost


def block_cost(model: ModelConfig, mixer: str, sequence: int) -> Cost:
    """Cost of a residual block: norms, temporal mixer and MLP."""
    norms = Cost(0.0, 2 * 10.0 * model.width)  # read, write, and the residual sum
    mlp = Cost(2.0 * 3 * model.width * model.mlp_width, 6.0 * model.mlp_width)
    return norms + MIXERS[mixer].load().cost(model, sequence) + mlp


def embedding_cost(model: ModelConfig) -> Cost:
    return Cost(0.0, 4.0 * model.width)


def logits_cost(model: ModelConfig) -> Cost:
    return Cost(2.0 * model.width * model.vocabulary, 10.0 * model.vocabulary)


def train_flops_per_token(model: ModelConfig, sequence: int) -> float:
    """Model FLOPs of one training step per token (forward and backward)."""
    blocks = sum(block_cost(model, mixer, sequence).flops for mixer in model.pattern)
    return 3.0 * (blocks + logits_cost(model).flops)


def split_blocks(model: ModelConfig, stages: int, sequence: int) -> tuple[int, ...]:
    """Blocks of each stage in model order, such that the slowest stage is as fast as can be.

    The embedding counts to the first stage and the logits to the last. Every stage has at least one block.
    """
    if stages == 1:  # tools that only move bytes ask too: mixers' costs come with torch
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
        """(slowest stage, sum of squares, sizes) of stages from `stage` on that hold the blocks from `start` on.

        The sum of squares prefers the more even of splits with the same slowest stage.
        """
        ends = [total] if stage == stages - 1 else range(start + 1, total - (stages - stage - 1) + 1)
        found = []
        for end in ends:
            cost = until[end] - until[start] + (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
            rest = best(stage + 1, end) if stage < stages - 1 else (0.0, 0.0, ())
            found.append((max(cost, rest[0]), cost**2 + rest[1], (end - start, *rest[2])))
        return min(found)

    return best(0, 0)[2]

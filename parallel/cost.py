"""What a block costs: one estimate for the reported FLOP/s and for the split of a model over pipeline stages.

Forward floating-point operations per token count every matrix product twice its multiply-adds (the convention of the
PaLM paper, arXiv 2204.02311, appendix B) and nothing else; a training step is three times that, recomputation not
counted:

    recurrent block      2 (3 D R + 2 R^2 / gate_blocks)
    attention block      2 (2 D H hd + 2 D hd) + 4 H hd K     K: mean number of keys that a query sees
    MLP                  2 (3 D F)
    logits               2 D V

The recurrence itself is bound by memory traffic, so that the stage split adds bytes moved outside matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT, ModelConfig

# bf16 matrix FLOPs that take the time of moving one byte: about 800 TFLOP/s over 4 TB/s on a Hopper GPU.
FLOPS_PER_BYTE = 200.0


@dataclass(frozen=True)
class Cost:
    """Forward cost per token: matrix FLOPs, and bytes moved outside matrix products (bfloat16)."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def time(self) -> float:
        """In units of one matrix FLOP."""
        return self.flops + FLOPS_PER_BYTE * self.bytes


def mean_keys(sequence: int, window: int | None) -> float:
    """Mean number of keys that a query of a causal sequence sees, itself included; `window` limits it."""
    reach = min(sequence, window or sequence)
    return reach - reach * (reach - 1) / (2 * sequence)


def block_cost(model: ModelConfig, mixer: str, sequence: int) -> Cost:
    """Cost of a residual block: norms, temporal mixer and MLP."""
    D, R, F, A = model.width, model.recurrent_width, model.mlp_width, model.attention_width
    norms = Cost(0.0, 2 * 10.0 * D)  # read, write, and the residual sum
    mlp = Cost(2.0 * 3 * D * F, 6.0 * F)
    if mixer == RECURRENT:
        # conv 4, gates, scan and GeLU branch 12 bytes per element
        mix = Cost(2.0 * (3 * D * R + 2 * R * model.gate_block_width), 16.0 * R)
    else:
        assert mixer in (ATTENTION, GLOBAL_ATTENTION), mixer
        keys = mean_keys(sequence, model.window if mixer == ATTENTION else None)
        mix = Cost(2.0 * (2 * D * A + 2 * D * model.head_dim) + 4.0 * A * keys, 8.0 * A)
    return norms + mix + mlp


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

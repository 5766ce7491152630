"""The two configurations that a stage of the model is built from: architecture and layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The mixers of published models; all that there are: `griffin.parallel.mixers.MIXERS`.
RECURRENT = "recurrent"
ATTENTION = "attention"
GLOBAL_ATTENTION = "global_attention"
INITS = ("jax", "torch")
# What a block runs again in its backward pass instead of keeping it ("none" keeps everything); "states" are the
# recurrence's.
RECOMPUTES = ("none", "states", "mixer", "mlp", "block")

CONV_WIDTH = 4
VOCABULARY_MULTIPLE = 128
# Divisible by every tensor-parallel size up to 8 and by 10, 12, 14, 15, 16, 20, 32, 64.
MOST_ATOMS = 6720


def axis_atoms(size: int) -> int:
    """Number of equal atoms that an MLP or vocabulary axis of `size` is cut into; a tensor-parallel size divides it."""
    return math.gcd(size, MOST_ATOMS)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a Griffin, Hawk or multi-query Transformer (arXiv 2402.19427, section 2).

    `pattern` names the temporal mixer of each block, first block first.
    """

    pattern: tuple[str, ...]
    width: int  # D
    recurrent_width: int  # R, the paper's D_RNN
    heads: int  # H query heads; there is one key/value head
    head_dim: int
    gate_blocks: int = 16  # diagonal blocks of each RG-LRU gate
    mlp_expansion: int = 3
    window: int = 1024  # keys that a query of local attention sees, itself included
    vocabulary: int = 256_000
    scale_embedding: bool = False  # multiply embeddings by sqrt(D), rounded to bfloat16
    logit_soft_cap: float = 0.0  # c of c * tanh(x / c); 0 is off
    init: str = "jax"  # which published initialisation the gates and the MLP input follow

    @property
    def blocks(self) -> int:
        return len(self.pattern)

    @property
    def mlp_width(self) -> int:
        return self.mlp_expansion * self.width

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def gate_block_width(self) -> int:
        return self.recurrent_width // self.gate_blocks

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding in memory: the same whatever the layout."""
        return math.ceil(self.vocabulary / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over ranks. The data-parallel size is what the world size leaves."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # stages that each pipeline rank holds (interleaved schedule where > 1)
    sequence_parallel: bool = False
    stages: tuple[int, ...] = ()  # blocks of each of the pipeline x virtual stages in model order; () balances cost

    @property
    def model_ranks(self) -> int:
        return self.tensor * self.pipeline

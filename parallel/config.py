"""The two configurations that a stage of the model is built from: architecture and layout."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from griffin.parallel.setting import about, setting

# The mixers of published models; all that there are: `griffin.parallel.mixers.MIXERS`.
RECURRENT = "recurrent"
ATTENTION = "attention"
GLOBAL_ATTENTION = "global_attention"
INITS = ("jax", "torch")
# What a block runs again in its backward pass instead of keeping it ("none" keeps everything); "states" are the
# recurrence's.
RECOMPUTES = ("none", "states", "mixer", "mlp", "block")

CONV_WIDTH = 4
MOST_VOCABULARY = 2**24
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

    pattern: tuple[str, ...] = field(
        metadata=about('mixer of each block: a list of `"recurrent"`, `"attention"`, `"global_attention"`')
    )
    width: int = field(metadata=about("D, the residual stream", least=1, most=2**20))
    recurrent_width: int = field(metadata=about("R, channels of the recurrence", least=1, most=2**20))
    heads: int = field(metadata=about("query heads; there is one key/value head", least=1, most=2**12))
    head_dim: int = field(metadata=about("width of each head, a multiple of 4", least=1, most=2**12))
    gate_blocks: int = setting(
        16, "diagonal blocks of each RG-LRU gate; the tensor size divides it", least=1, most=2**12
    )
    mlp_expansion: int = setting(3, "MLP width over D", least=1, most=2**8)
    window: int = setting(1024, "keys that local attention sees, the query's own included", least=1, most=2**24)
    vocabulary: int = setting(
        None,
        f"tokens; padded in memory to a multiple of {VOCABULARY_MULTIPLE}",
        least=1,
        most=MOST_VOCABULARY,
        default_means="of the data",
    )
    scale_embedding: bool = setting(False, "multiply embeddings by sqrt(D), rounded to bfloat16")
    logit_soft_cap: float = setting(0.0, "c of c tanh(logits / c); 0 is off", least=0.0, most=1e30, off=True)
    init: str = setting(
        "jax",
        'standard deviations of gates and MLP input as in DeepMind\'s `"jax"` or `"torch"` code',
        choices=INITS,
    )

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
class Axis:
    """An axis of the grid.

    name: also of the setting of `ParallelConfig` that holds its size.
    size_argument: what megatron-core calls the size; None for the axis that takes the ranks that the others leave.
    shards_weights: ranks along it hold different weights; otherwise they hold copies.
    shards_tokens: ranks along it see different tokens; otherwise they see the same ones.
    """

    name: str
    size_argument: str | None
    shards_weights: bool = False
    shards_tokens: bool = False


# Ranks are numbered along the first axis first, as in megatron-core.
AXES = (
    Axis(name="tensor", size_argument="tensor_model_parallel_size", shards_weights=True),
    Axis(name="data", size_argument=None, shards_tokens=True),
    Axis(name="pipeline", size_argument="pipeline_model_parallel_size", shards_weights=True),
)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over ranks. The data-parallel size is what the world size leaves."""

    tensor: int = setting(1, "ranks that share every block", least=1, most=2**12)
    pipeline: int = setting(1, "ranks that share the blocks", least=1, most=2**12)
    virtual_pipeline: int = setting(
        1, "stages per pipeline rank; more than 1 interleaves their schedules", least=1, most=2**12
    )
    sequence_parallel: bool = setting(False, "shard activations between blocks over tensor ranks")
    stages: tuple[int, ...] = setting(
        (),
        "blocks of each of the pipeline x virtual stages, in model order",
        default_means="by cost",
    )

    @property
    def model_axes(self) -> dict[str, int]:
        """Sizes of all axes of the grid but the data-parallel one, by name."""
        return {axis.name: getattr(self, axis.name) for axis in AXES if axis.size_argument is not None}

    @property
    def model_ranks(self) -> int:
        """Ranks that a world size must be a multiple of."""
        return math.prod(self.model_axes.values())

    @property
    def megatron_sizes(self) -> dict[str, int]:
        """`model_axes` by megatron-core's names of the sizes."""
        return {axis.size_argument: getattr(self, axis.name) for axis in AXES if axis.size_argument is not None}

    def record(self, world_size: int) -> dict[str, Any]:
        """The layout as manifests and environment.json state it, with the data-parallel size."""
        sizes = {name: value for name, value in asdict(self).items() if name != "stages"}
        return sizes | {"data": world_size // self.model_ranks}

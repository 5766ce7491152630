"""Configurations of the model architecture and of its parallel layout, and the axes of the rank grid."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from griffin.parallel.setting import about, setting

# Mixers of the published models. `griffin.parallel.mixers.MIXERS` holds all registered ones.
RECURRENT = "recurrent"
ATTENTION = "attention"
GLOBAL_ATTENTION = "global_attention"
INITS = ("jax", "torch")
# What each block computes or gathers again in the backward pass; all but "none" gather.
NORMS_GELU = "norms+gelu"
RECOMPUTES = ("none", "gather", "states", NORMS_GELU, "mixer", "mlp", "block")

CONV_WIDTH = 4
MOST_VOCABULARY = 2**24
VOCABULARY_MULTIPLE = 128
# Divisible by every tensor-parallel size up to 8 and by 10, 12, 14, 15, 16, 20, 32, 64.
MOST_ATOMS = 6720


def axis_atoms(size: int) -> int:
    """Return the number of equal atoms of an MLP or vocabulary axis. The tensor-parallel size must divide it."""
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
        """Rows of the embedding in memory, the same for every layout."""
        return math.ceil(self.vocabulary / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis of the rank grid.

    name: name of the axis, and of the `ParallelConfig` setting with its size.
    size_argument: megatron-core's name of the size. None for the axis whose size follows from the world size.
    shards_weights: ranks along the axis hold different weights; otherwise they hold copies.
    shards_tokens: ranks along the axis process different tokens; otherwise they process the same tokens.
    """

    name: str
    size_argument: str | None
    shards_weights: bool = False
    shards_tokens: bool = False


# In rank order: the first axis varies fastest, as in megatron-core.
AXES = (
    Axis(name="tensor", size_argument="tensor_model_parallel_size", shards_weights=True),
    Axis(name="data", size_argument=None, shards_tokens=True),
    Axis(name="pipeline", size_argument="pipeline_model_parallel_size", shards_weights=True),
)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel layout of the model. The data-parallel size is the world size over the product of the other sizes."""

    tensor: int = setting(1, "ranks that share every block", least=1, most=2**12)
    pipeline: int = setting(1, "ranks that share the blocks", least=1, most=2**12)
    virtual_pipeline: int = setting(
        1, "stages per pipeline rank; more than 1 interleaves their schedules", least=1, most=2**12
    )
    sequence_parallel: bool = setting(False, "shard activations between blocks over tensor ranks")
    overlap_tensor: str = setting(
        "auto",
        "sequence parallelism's communication behind matrix products, in pieces, over symmetric memory: "
        '`"on"`, `"off"`, or on GPUs where a check at the start finds that it works',
        choices=("auto", "on", "off"),
    )
    stages: tuple[int, ...] = setting(
        (),
        "blocks of each of the pipeline x virtual stages, in model order",
        default_means="by cost",
    )

    @property
    def model_axes(self) -> dict[str, int]:
        """Sizes of all axes except the data-parallel one, by name."""
        return {axis.name: getattr(self, axis.name) for axis in AXES if axis.size_argument is not None}

    @property
    def model_ranks(self) -> int:
        """Number of ranks of one model replica, of which the world size is a multiple."""
        return math.prod(self.model_axes.values())

    @property
    def megatron_sizes(self) -> dict[str, int]:
        """Sizes of `model_axes` as keyword arguments of megatron-core."""
        return {axis.size_argument: getattr(self, axis.name) for axis in AXES if axis.size_argument is not None}

    def record(self, world_size: int) -> dict[str, Any]:
        """Return the layout as written to manifests and environment.json, with the data-parallel size."""
        sizes = {name: value for name, value in asdict(self).items() if name not in ("stages", "overlap_tensor")}
        return sizes | {"data": world_size // self.model_ranks}

"""What the blocks of a stage share: configurations, the rank grid, and the packed documents of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from griffin.kernels.backends import AUTO
from griffin.kernels.local_attention import AttentionMask, attention_mask
from griffin.kernels.rotary import rotation
from griffin.parallel.config import ModelConfig, ParallelConfig
from griffin.parallel.world.grid import Grid

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything that a module of a stage is built from."""

    model: ModelConfig
    grid: Grid
    megatron: TransformerConfig
    device: torch.device  # of the parameters; meta where only their shapes are asked for
    kernels: str = AUTO  # backend of all operators but attention

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter of that shape on this rank."""
        return nn.Parameter(torch.empty(shape, dtype=self.megatron.params_dtype, device=self.device))


def megatron_config(
    model: ModelConfig, layout: ParallelConfig, dtype: torch.dtype, device: torch.device
) -> TransformerConfig:
    """megatron-core's configuration of layers, schedules and gradient reduction for this model and layout."""
    on_gpu = device.type == "cuda"
    interleaved = layout.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.blocks,
        hidden_size=model.width,
        ffn_hidden_size=model.mlp_width,
        num_attention_heads=layout.tensor,  # unused (attention is ours) but checked against the tensor size
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        sequence_parallel=layout.sequence_parallel and layout.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        perform_initialization=False,  # sharding.initialize draws layout-independent weights
        deallocate_pipeline_outputs=True,
        # Batched sends of the interleaved schedule are silently wrong over gloo; on GPU, overlap excludes them.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved and on_gpu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


class Documents:
    """The packed documents of a micro-batch, in the forms that mixers ask for; each is computed once per stage.

    positions: int64 [B, T], 0 at every document's first token.
    """

    def __init__(self, positions: Tensor):
        self._positions = positions
        self._masks: dict[int | None, AttentionMask] = {}
        self._rotations: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T, B]."""
        return self._positions.t().contiguous()

    @cached_property
    def starts(self) -> Tensor:
        """bool [T, B], True at a document's first token."""
        return self.positions == 0

    def mask(self, window: int | None) -> AttentionMask:
        """Which keys each query sees; `window` None is all earlier tokens of its document."""
        if window not in self._masks:
            ids = (self._positions == 0).cumsum(dim=1)
            self._masks[window] = attention_mask(ids, window)
        return self._masks[window]

    def rotation(self, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine by which heads turn at each token, float32 [T, B, hd / 4]."""
        if head_dim not in self._rotations:
            self._rotations[head_dim] = rotation(self.positions, head_dim)
        return self._rotations[head_dim]


class Clock:
    """The time at which B sequences go on, whose last tokens lie at one time: shorter ones began later.

    time: of the tokens that come next.
    starts: int64 [B], the time of each sequence's first token.
    latest_start: the largest of them.
    """

    def __init__(self, starts: Tensor, time: int):
        self.starts, self.time = starts, time
        self.latest_start = int(starts.max())
        self._shared: dict[Hashable, Any] = {}

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What the blocks of a model share for as long as its sequences go on: made when it is first asked for."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

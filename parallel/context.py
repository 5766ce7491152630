"""State shared by the blocks of a stage: configurations, rank grid, packed documents, and the decoding position."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeVar

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from griffin.kernels.backends import AUTO
from griffin.kernels.local_attention import AttentionMask, Offsets, attention_mask, document_offsets
from griffin.kernels.rotary import rotary_cos_sin
from griffin.parallel.config import ModelConfig, ParallelConfig
from griffin.parallel.world.grid import Grid

T = TypeVar("T")

CU_SEQLENS, MAX_SEQLEN = "cu_seqlens", "max_seqlen"  # of a batch: `Offsets` of its documents, the second on the host


@dataclass(frozen=True, kw_only=True)
class Context:
    """Shared construction arguments of the modules of a stage."""

    model: ModelConfig
    grid: Grid
    megatron: TransformerConfig
    device: torch.device  # of the parameters; meta if only their shapes are needed
    kernels: str = AUTO  # backend of all operators but attention
    attention: str = AUTO  # backend of attention
    z_loss: float = 0.0  # factor of the squared log-sum-exp in the loss
    keep_gathered: bool = False  # keep inputs of linears that are all-gathered, instead of gathering them again
    overlap_tensor: bool = False  # all-gather and reduce-scatter behind matrix products; with sequence parallelism only

    def parameter(self, *shape: int) -> nn.Parameter:
        """Return an uninitialised parameter of this local shape."""
        return nn.Parameter(torch.empty(shape, dtype=self.megatron.params_dtype, device=self.device))


def megatron_config(
    model: ModelConfig, layout: ParallelConfig, dtype: torch.dtype, device: torch.device
) -> TransformerConfig:
    """Return megatron-core's configuration of layers, schedules and gradient reduction for a model and layout."""
    on_gpu = device.type == "cuda"
    interleaved = layout.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.blocks,
        hidden_size=model.width,
        ffn_hidden_size=model.mlp_width,
        num_attention_heads=layout.tensor,  # unused by our attention, but checked against the tensor size
        **layout.megatron_sizes,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        sequence_parallel=layout.sequence_parallel and layout.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        perform_initialization=False,  # sharding.initialize draws layout-independent weights
        deallocate_pipeline_outputs=True,
        # The interleaved schedule's batched sends give silently wrong results with gloo; on GPUs overlap excludes them.
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # for PyTorch of old, whose batched receives could be read too early
        overlap_p2p_comm=interleaved and on_gpu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


class Documents:
    """Packed documents of a micro-batch, in the forms that mixers use, each computed once per stage.

    positions: int64 [B, T], 0 at every document's first token.
    offsets: of the documents, for backends of attention that need them. If None they are found, which waits for a GPU.
    """

    def __init__(self, positions: Tensor, offsets: Offsets | None = None):
        self._positions = positions
        self._offsets = offsets
        self._masks: dict[tuple[int | None, str], AttentionMask] = {}
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor]) -> Self:
        """Return the documents of a batch's `positions`, with its offsets if it has them (`with_offsets`)."""
        if CU_SEQLENS not in batch:
            return cls(batch["positions"])
        assert batch[MAX_SEQLEN].device.type == "cpu", "reading it from a GPU would wait for the GPU"
        return cls(batch["positions"], Offsets(batch[CU_SEQLENS], int(batch[MAX_SEQLEN])))

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T, B]."""
        return self._positions.t().contiguous()

    @cached_property
    def starts(self) -> Tensor:
        """bool [T, B], True at a document's first token."""
        return self.positions == 0

    def mask(self, window: int | None, backend: str = AUTO) -> AttentionMask:
        """Return the attention mask. With `window` None a query sees all earlier tokens of its document."""
        if (window, backend) not in self._masks:
            ids = (self._positions == 0).cumsum(dim=1)
            self._masks[window, backend] = attention_mask(ids, window, backend=backend, offsets=self._offsets)
        return self._masks[window, backend]

    def rotary(self, head_dim: int) -> tuple[Tensor, Tensor]:
        """Return the cosine and sine of every token's rotary angles, float32 [T, B, hd / 4]."""
        if head_dim not in self._rotary:
            self._rotary[head_dim] = rotary_cos_sin(self.positions, head_dim)
        return self._rotary[head_dim]


def with_offsets(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch on the CPU with the offsets of its documents added: int32 `cu_seqlens`, int64 [] `max_seqlen`."""
    offsets = document_offsets(batch["positions"] == 0)
    return {**batch, CU_SEQLENS: offsets.cu_seqlens, MAX_SEQLEN: torch.tensor(offsets.max_seqlen)}


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch with its tensors on a device, without waiting for it; `max_seqlen` stays on the host."""
    return {
        name: tensor if name == MAX_SEQLEN else tensor.to(device, non_blocking=True) for name, tensor in batch.items()
    }


class DecodePosition:
    """Position of the next token of B left-padded sequences, the same index for all of them.

    index: of the next token, counted from the start of the longest prompt.
    starts: int64 [B], index of each sequence's first token.
    latest_start: maximum of `starts`.
    """

    def __init__(self, starts: Tensor, index: int):
        self.starts, self.index = starts, index
        self.latest_start = int(starts.max())
        self._cache: dict[Hashable, Any] = {}

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the object that all blocks share under this key; `make` creates it on first use."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

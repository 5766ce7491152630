"""Pipeline stage: embedding (first stage), residual blocks, final norm with logits and loss (last stage)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from griffin.kernels.backends import AUTO
from griffin.kernels.linear_cross_entropy import soft_capped
from griffin.kernels.local_attention import resolve_backend
from griffin.parallel import megatron_device
from griffin.parallel.block import ResidualBlock, residual_sum
from griffin.parallel.config import ModelConfig, ParallelConfig, axis_atoms
from griffin.parallel.context import Context, Documents, megatron_config
from griffin.parallel.cost import split_blocks
from griffin.parallel.layers.embedding import Embedding
from griffin.parallel.layers.linear import Branch, overlaps_tensor
from griffin.parallel.layers.loss import Loss, vocabulary_loss
from griffin.parallel.layers.norm import RMSNorm
from griffin.parallel.sharding import Piece, describe, normal
from griffin.parallel.world.grid import Grid


class Stage(MegatronModule):
    """Blocks [first, last) of the model, for megatron-core's schedules.

    A batch maps `tokens`, `labels` and `positions` to int64 [B, T]; positions are 0 at every document's first token.
    `loss_mask`, float32 [B, T], holds the weights of tokens in the loss, 1 if it is absent. `cu_seqlens` and
    `max_seqlen` (see `context.with_offsets`) save waiting for a GPU. The last stage returns the loss. Without `labels`
    it returns this rank's shard of the logits [T, B, padded vocabulary / t], float32, -inf at padding. Other stages
    return activations [T, B, D] (sharded along T with sequence parallelism).
    """

    def __init__(
        self,
        context: Context,
        first: int,
        last: int,
        *,
        is_first: bool,
        is_last: bool,
        virtual_stage: int | None = None,
        recompute: str = "none",
    ):
        super().__init__(context.megatron)
        self.model = context.model
        # megatron-core's schedules and finalize_model_grads read the attributes below.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = is_first, is_last
        self.vp_stage = virtual_stage
        self.share_embeddings_and_output_weights = True
        self._input: Tensor | None = None
        if is_first:
            self.embedding = Embedding(context)
            _describe_embedding(self.embedding.weight, context.model, shared=False)
        self.blocks = nn.ModuleList(
            ResidualBlock(index, context.model.pattern[index], context, recompute) for index in range(first, last)
        )
        if is_last:
            self.final_norm = RMSNorm("final_norm", context)
            self.logits = Logits(context, owns_weight=not is_first)

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Receive the activations of the previous stage. Called by the schedule."""
        self._input = tensors[0]

    def shared_embedding_or_output_weight(self) -> nn.Parameter | None:
        if self.pre_process:
            return self.embedding.weight
        return self.logits.weight if self.post_process else None

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor | Loss:
        x, branch = self._residual(batch)
        if not self.post_process:
            return residual_sum(x, branch)
        if "labels" not in batch:
            return self.head(x, branch)
        weights = batch["loss_mask"] if "loss_mask" in batch else torch.ones_like(batch["labels"], dtype=torch.float32)
        table = self.shared_embedding_or_output_weight()
        return self.logits(self.final_norm(x, branch)[1], table, batch["labels"].t(), weights.t())

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the output of the stage's last block, [T, B, D]; see the class."""
        return residual_sum(*self._residual(batch))

    def head(self, x: Tensor, branch: Branch | None = None) -> Tensor:
        """Return this rank's shard of the logits of the last stage's x [T, B, D] and last branch; see `Logits`."""
        return self.logits(self.final_norm(x, branch)[1], self.shared_embedding_or_output_weight())

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the first block's input for tokens [B, T]: [T, B, D], or [T/t, B, D] with sequence parallelism."""
        x = self.embedding(tokens)  # [B, T, D], or [T/t, B, D] with sequence parallelism
        if not self.config.sequence_parallel:
            x = x.transpose(0, 1).contiguous()
        return self.scaled(x)

    def _residual(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Branch | None]:
        """Return the residual stream after the stage's last block: x, and the branch that is to be added."""
        documents = Documents.of_batch(batch)
        x = self.embed(batch["tokens"]) if self.pre_process else self._input
        assert x is not None, "no activations from the previous stage"
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch, documents)
        return x, branch

    def scaled(self, x: Tensor) -> Tensor:
        """Return embeddings x, scaled if the model scales them."""
        if self.model.scale_embedding:
            # The published models round the factor to bfloat16, whatever the compute dtype.
            x = x * torch.tensor(math.sqrt(self.model.width), dtype=torch.bfloat16).to(x.dtype)
        return x


class Logits(nn.Module):
    """Tied output projection: x [T, B, D] -> this rank's shard of the logits [T, B, padded vocabulary / t], float32.

    With labels and their weights, [T, B], it returns the loss instead. The last of several pipeline stages owns a copy
    of the embedding table; a single stage passes the table itself.
    """

    def __init__(self, context: Context, *, owns_weight: bool):
        super().__init__()
        self.context = context
        self.rows = context.model.padded_vocabulary // context.grid.tensor_size
        self.valid_rows = min(max(context.model.vocabulary - context.grid.tensor_rank * self.rows, 0), self.rows)
        self.weight: nn.Parameter | None = None
        if owns_weight:
            self.weight = context.parameter(self.rows, context.model.width)
            _describe_embedding(self.weight, context.model, shared=True)

    def forward(
        self, x: Tensor, table: nn.Parameter, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor | Loss:
        if labels is not None and weights is not None:
            is_embedding = self.weight is None
            return vocabulary_loss(
                x, table, labels, weights, self.context, valid=self.valid_rows, is_embedding=is_embedding
            )
        sequence_parallel = self.context.megatron.sequence_parallel
        logits = linear_with_grad_accumulation_and_async_allreduce(
            x,
            table,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.context.grid.tensor_size > 1 and not sequence_parallel,
            sequence_parallel=sequence_parallel,
            tp_group=self.context.grid.tensor_group,
        )
        return self.capped(logits)

    def capped(self, logits: Tensor) -> Tensor:
        """Return raw logits in float32, soft-capped, and -inf at the vocabulary's padding."""
        logits = soft_capped(logits.float(), self.context.model.logit_soft_cap)
        if self.valid_rows < self.rows:
            padding = torch.arange(self.rows, device=logits.device) >= self.valid_rows
            logits = logits.masked_fill(padding, float("-inf"))
        return logits


def _describe_embedding(weight: nn.Parameter, model: ModelConfig, *, shared: bool) -> None:
    describe(
        weight,
        Piece(
            name="embedding.weight",
            shape=(model.vocabulary, model.width),
            init=normal(math.sqrt(1 / model.width)),
            axis=0,
            atoms=axis_atoms(model.padded_vocabulary),
            padded=model.padded_vocabulary,
        ),
        weight_decay=False,
        shared=shared,
    )
    # megatron-core gives it a bucket of its own: the first and the last stage then hold the same shard, whose gradients
    # are summed.
    weight.shared_embedding = True  # type: ignore[attr-defined]


def stage_blocks(model: ModelConfig, layout: ParallelConfig, sequence: int) -> tuple[int, ...]:
    """Return the blocks of each of the pipeline x virtual stages in model order: as configured, else by cost."""
    return layout.stages or split_blocks(model, layout.pipeline * layout.virtual_pipeline, sequence)


def build_stages(
    model: ModelConfig,
    layout: ParallelConfig,
    grid: Grid,
    *,
    dtype: torch.dtype,
    sequence: int,
    recompute: str = "none",
    kernels: str = AUTO,
    attention: str = AUTO,
    z_loss: float = 0.0,
    device: torch.device | None = None,
) -> list[Stage]:
    """Build the stages that this rank holds, first to last, with uninitialised weights (see `sharding.initialize`).

    Stage s of the pipeline x virtual stages is held by pipeline rank s mod pipeline. `device` defaults to the rank's
    device.
    """
    device = device or grid.device
    context = Context(
        model=model,
        grid=grid,
        megatron=megatron_config(model, layout, dtype, grid.device),
        device=device,
        kernels=kernels,
        attention=resolve_backend(attention, device, dtype, model.head_dim, "train.attention"),
        overlap_tensor=overlaps_tensor(layout, grid),
        z_loss=z_loss,
        keep_gathered=recompute == "none",
    )
    sizes = stage_blocks(model, layout, sequence)
    assert len(sizes) == layout.pipeline * layout.virtual_pipeline, sizes
    assert sum(sizes) == model.blocks, sizes
    stages = []
    for virtual in range(layout.virtual_pipeline):
        place = virtual * layout.pipeline + grid.pipeline_rank
        first = sum(sizes[:place])
        stages.append(
            Stage(
                context,
                first,
                first + sizes[place],
                is_first=place == 0,
                is_last=place == len(sizes) - 1,
                virtual_stage=virtual if layout.virtual_pipeline > 1 else None,
                recompute=recompute,
            )
        )
    return stages


def meta_stage(model: ModelConfig, grid: Grid) -> Stage:
    """Build the whole model as one stage of meta tensors, for names and shapes. For ranks of the first stage only."""
    with megatron_device.on_meta():
        (stage,) = build_stages(
            model, ParallelConfig(), grid, dtype=torch.float32, sequence=1, device=torch.device("meta")
        )
    return stage

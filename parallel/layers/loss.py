"""The loss of the last stage over tensor ranks that share the vocabulary, and the tied table's gradient."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor, nn

from griffin.kernels.linear_cross_entropy import linear_cross_entropy
from griffin.parallel.context import Context
from griffin.parallel.layers.linear import gradient_was_added


class Loss(NamedTuple):
    """Loss of a micro-batch, the same on every tensor rank."""

    total: Tensor  # float32 []: weighted sum over tokens, z-loss included; gradients flow from it alone
    tokens: Tensor  # float32 [T, B]: cross-entropy of each token in nats, without weights, z-loss and gradient


def vocabulary_loss(
    x: Tensor, table: nn.Parameter, labels: Tensor, weights: Tensor, context: Context, *, valid: int, is_embedding: bool
) -> Loss:
    """Compute the loss of the final norm's output with this rank's rows of the vocabulary.

    Where the table has a `main_grad`, as parameters in megatron-core's buffers have, its gradient is added there in
    float32; elsewhere autograd gets it.

    Args:
        x: [T, B, D], or this rank's part of T with sequence parallelism.
        labels, weights: [T, B]; int64, and float32.
        valid: rows of the table that are no padding.
        is_embedding: whether the stage's embedding gives the table a gradient too.
    """
    group, tensor_size = context.grid.tensor_group, context.grid.tensor_size
    if context.megatron.sequence_parallel:
        x = gather_from_sequence_parallel_region(x, group=group)
    elif tensor_size > 1:
        x = copy_to_tensor_model_parallel_region(x, group=group)

    def gather(found: Tensor) -> Tensor:
        every = found.new_empty(tensor_size * len(found), *found.shape[1:])
        dist.all_gather_into_tensor(every, found, group=group)
        return every.view(tensor_size, *found.shape)

    # The embedding of the same stage adds its gradient later in the backward, and then tells autograd.
    added = (lambda: None) if is_embedding else partial(gradient_was_added, table)
    total, losses = linear_cross_entropy(
        x,
        table,
        labels,
        weights,
        soft_cap=context.model.logit_soft_cap,
        z_loss=context.z_loss,
        valid=valid,
        first=context.grid.tensor_rank * len(table),
        gather=gather if tensor_size > 1 else None,
        main_grad=getattr(table, "main_grad", None),
        added=added,
        # The definition knows no ranks.
        backend="cpu" if context.kernels == "reference" else context.kernels,
    )
    return Loss(total, losses)

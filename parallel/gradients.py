"""Gradient reductions beyond data parallelism, as the schedules call them at the end of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor, nn

from griffin.parallel.world.grid import Grid


def sum_tensor_gradients(modules: Sequence[nn.Module], grid: Grid) -> None:
    """Sum over tensor ranks the gradients of replicated parameters of which each rank computed a part (key/value)."""
    if grid.tensor_size == 1:
        return
    gradients = [
        parameter.main_grad  # type: ignore[attr-defined]
        for module in modules
        for parameter in module.parameters()
        if getattr(parameter, "tensor_sum", False)
    ]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=grid.tensor_group)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def scale_shards(chunks: Sequence[DistributedDataParallel], tokens: Tensor, grid: Grid) -> None:
    """Divide the gradients by the number of tokens of the global batch: the sum of `tokens` over data-parallel ranks.

    `tokens` [1] is known on the last pipeline rank. Only what this rank updates is divided: its shard of every bucket.
    The device is not waited for.
    """
    if grid.pipeline_size > 1:
        last = dist.get_process_group_ranks(grid.pipeline_group)[-1]
        dist.broadcast(tokens, src=last, group=grid.pipeline_group)
    dist.all_reduce(tokens, group=grid.data_group)
    scale = 1.0 / tokens.clamp(min=1)  # without any token the gradient is zero
    for chunk in chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                bucket.grad_data.view(grid.data_size, -1)[grid.data_rank].mul_(scale)


def finalize_gradients(grid: Grid) -> Any:
    """megatron-core's finalize_model_grads with `sum_tensor_gradients`, for `config.finalize_model_grads_func`.

    The order does not matter: data-parallel reduction, tensor-parallel sum and the division by the number of tokens
    are linear. That division is ours: megatron-core divides the whole buffer, and waits for the device before.
    """

    def finalize(model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(model, None, **kwargs)
        sum_tensor_gradients(model, grid)
        if num_tokens is not None:
            scale_shards(model, num_tokens, grid)

    return finalize

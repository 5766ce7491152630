"""Gradient reductions besides data parallelism, called by megatron-core's schedules at the end of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor, nn

from griffin.parallel.world.grid import Grid


def sum_tensor_gradients(modules: Sequence[nn.Module], grid: Grid) -> None:
    """All-reduce the partial gradients of replicated parameters over tensor ranks (the key/value projection)."""
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
    """Divide the gradients by the number of tokens of the global batch, without synchronising with the device.

    `tokens` [1] is this rank's count on the last pipeline rank, and undefined elsewhere. Only the shard of every bucket
    that this rank updates is divided.
    """
    if grid.pipeline_size > 1:
        last = dist.get_process_group_ranks(grid.pipeline_group)[-1]
        dist.broadcast(tokens, src=last, group=grid.pipeline_group)
    dist.all_reduce(tokens, group=grid.replica_group)
    scale = 1.0 / tokens.clamp(min=1)  # without any token the gradient is zero
    replicas, replica = grid.axes.replicas, grid.axes.replica(grid.rank)
    for chunk in chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                bucket.grad_data.view(replicas, -1)[replica].mul_(scale)


def finalize_gradients(grid: Grid) -> Any:
    """Return a `config.finalize_model_grads_func`: megatron-core's finalize_model_grads, then `sum_tensor_gradients`.

    The division by the number of tokens is ours: megatron-core's divides the whole buffer, and synchronises with the
    device first. Dividing before the tensor-parallel sum rounds as megatron-core does.
    """

    def finalize(model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(model, None, **kwargs)
        if num_tokens is not None:
            scale_shards(model, num_tokens, grid)
        sum_tensor_gradients(model, grid)

    return finalize

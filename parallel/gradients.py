"""Gradient reductions besides data parallelism, called by megatron-core's schedules at the end of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
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


def finalize_gradients(grid: Grid) -> Any:
    """Return a `config.finalize_model_grads_func`: megatron-core's finalize_model_grads, then `sum_tensor_gradients`.

    Data-parallel reduction, tensor-parallel sum and division by the number of tokens are linear, so their order does
    not matter.
    """

    def finalize(model: list[nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(model, num_tokens, **kwargs)
        sum_tensor_gradients(model, grid)

    return finalize

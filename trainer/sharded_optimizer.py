"""The optimizer of a rank: each data-parallel rank updates a shard of every parameter (ZeRO-1).

megatron-core's DistributedOptimizer does the work. What is used of it beyond its documented interface is used in this
module alone. Lines of megatron-core 0.16.1, below megatron/core:

optimizer/distrib_optimizer.py
    174 _build_model_gbuf_range: the elements of a bucket that a data-parallel rank updates
    528 is_stub_optimizer: whether it has nothing to update
    571 model_param_gbuf_map: the parameters of which it updates elements
    610 _get_model_param_range_map: which elements of a parameter it updates
    883 _get_main_param_and_optimizer_states: their master weights and Adam's moments
    2429 _copy_main_params_to_model_params: master weights to this rank's shards of the model's weights
optimizer/optimizer.py
    185 prepare_grads: the model's gradients to the master weights' `grad`
    190 step_with_ready_grads: the update, and the start of the weights' way to the other ranks
    1105 chained_optimizers: one for each group of parameters that has its own process groups
distributed/distributed_data_parallel.py
    291 buffers: of parameters and gradients
    463 start_param_sync: the shards of the model's weights to all data-parallel ranks
distributed/param_and_grad_buffer.py
    631 buckets: the parts of a buffer that are reduced and gathered at a time
    633 param_index_map: where each parameter lies in a buffer (start, end, bucket)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from griffin.parallel import megatron_device
from griffin.parallel.stage import Stage
from griffin.parallel.world.grid import Grid
from griffin.trainer.measuring import norms
from griffin.trainer.optimizer import build_optimizer, build_schedule
from griffin.trainer.settings.sections import Config


def overlaps(config: Config, data_size: int, *, on_gpu: bool) -> bool:
    """Whether data-parallel communication runs behind computation."""
    return data_size > 1 and (config.train.overlap == "on" or (config.train.overlap == "auto" and on_gpu))


def in_buffers(stages: Sequence[Stage], overlap: bool) -> list[DistributedDataParallel]:
    """The stages of a rank with their parameters in megatron-core's buffers, of which each rank updates a shard."""
    return [
        DistributedDataParallel(
            config=stage.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
                use_distributed_optimizer=True,
            ),
            module=stage,
            disable_bucketing=place > 0,
        )
        for place, stage in enumerate(stages)
    ]


def shard_ranges(
    chunks: Sequence[DistributedDataParallel], data_rank: int, data_size: int
) -> dict[nn.Parameter, tuple[int, int]]:
    """The elements [start, stop) of flattened parameters that data-parallel rank `data_rank` of `data_size` updates.

    For planning: no optimizer is needed, and the parameters may be meta tensors.
    """
    ranges: dict[nn.Parameter, tuple[int, int]] = {}
    for chunk in chunks:
        for buffer in chunk.buffers:
            placed: list[dict[nn.Parameter, tuple[int, int, int]]] = [{} for _ in buffer.buckets]
            for parameter, place in buffer.param_index_map.items():
                placed[place[2]][parameter] = place
            for bucket, inside in enumerate(placed):
                # What the optimizer of that rank reads of the buffer; of its parameters only those in the bucket.
                view = SimpleNamespace(
                    data_parallel_group=SimpleNamespace(rank=lambda: data_rank, size=lambda: data_size),
                    buckets=buffer.buckets,
                    param_index_map=inside,
                )
                held = DistributedOptimizer._build_model_gbuf_range(view, bucket)["param_map"]
                ranges |= {
                    parameter: (extent["param"].start, extent["param"].end) for parameter, extent in held.items()
                }
    return ranges


class ShardedOptimizer:
    """AdamW with float32 master weights and its learning-rate schedule, for the parameters of `chunks`.

    A step is `zero_gradients`, forward and backward passes, `gradient_norm`, `advance_schedule`, and `clip_and_step`
    unless the update is left out.
    """

    def __init__(
        self,
        config: Config,
        grid: Grid,
        chunks: Sequence[DistributedDataParallel],
        *,
        dtype: torch.dtype,
        overlap: bool,
    ):
        self._grid, self._chunks, self._clip = grid, chunks, config.optimizer.clip
        self._megatron = build_optimizer(config, chunks, dtype, overlap=overlap)
        self._schedule = build_schedule(config, self._megatron)
        self._updater: dict[nn.Parameter, DistributedOptimizer] = {
            parameter: optimizer
            for optimizer in self._megatron.chained_optimizers
            if not optimizer.is_stub_optimizer
            for parameter in optimizer.model_param_gbuf_map
        }
        self.updates_done = 0  # the steps without those whose update was left out

    @property
    def param_groups(self) -> list[dict]:
        """The parameter groups, as those of a PyTorch optimizer: this rank's master weights and their settings."""
        return self._megatron.param_groups

    @property
    def learning_rate(self) -> float:
        """That of the last step; 0.0 before the first one if there is a warm-up."""
        return self._megatron.param_groups[0]["lr"]

    def zero_gradients(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._megatron.zero_grad()

    def gradient_norm(self) -> float:
        """Norm of the reduced gradient of the whole model, before clipping. A collective.

        From here to `clip_and_step`, the master weights have the gradients.
        """
        with megatron_device.cuda_type_names():
            self._megatron.prepare_grads()
            return float(self._megatron.get_grad_norm())

    def advance_schedule(self) -> None:
        """Set the learning rate of this step's update. Steps whose update is left out count as well."""
        self._schedule.step(1)

    def clip_and_step(self, norm: float) -> None:
        """Scale the gradient, whose norm is `norm`, down to `optimizer.clip`; update the weights. A collective."""
        with megatron_device.cuda_type_names():
            if self._clip > 0:
                for optimizer in self._megatron.chained_optimizers:
                    clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm=self._clip, total_norm=norm)
            self._megatron.step_with_ready_grads()
        self.updates_done += 1

    def gradient_squares(self) -> Tensor:
        """Sums of squares of this rank's shards of the gradients, float64 [kinds] (see `norms.squares`).

        Between `gradient_norm` and `clip_and_step`, which changes the gradients in place.
        """
        return self._squares(_gradient)

    def weight_squares(self) -> Tensor:
        """Sums of squares of this rank's shards of the master weights, float64 [kinds] (see `norms.squares`)."""
        return self._squares(torch.Tensor.detach)

    def _squares(self, part: Callable[[Tensor], Tensor]) -> Tensor:
        counted = [parameter for parameter in self._updater if norms.counts_once(parameter, self._grid)]
        return norms.squares(
            ((parameter, part(self._state(parameter)["param"])) for parameter in counted), self._grid.device
        )

    def shard_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Elements [start, stop) of the flattened parameter that this rank updates; (0, 0) is none."""
        optimizer = self._updater.get(parameter)
        if optimizer is None:
            return 0, 0
        extent = optimizer._get_model_param_range_map(parameter)["param"]
        return extent.start, extent.end

    def shard_state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Master weights and Adam's moments of those elements, float32 [stop - start] each, not copied.

        Moments are None before the first step; all is None where this rank updates nothing of the parameter.
        """
        if parameter not in self._updater:
            return None
        state = self._state(parameter)
        return state["param"], state.get("exp_avg"), state.get("exp_avg_sq")

    def set_shard_state(self, parameter: nn.Parameter, master: Tensor, moments: Tensor | None) -> None:
        """Replace what `shard_state` gives; `moments` is float32 [2, stop - start], or None for those of a new run.

        The model has the weights after `spread_weights`, and Adam counts on after `continue_after`.
        """
        main = self._state(parameter)["param"]
        main.copy_(master)
        if moments is not None:
            state = self._updater[parameter].optimizer.state[main]
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                if name in state:
                    state[name].copy_(moment)
                else:  # Adam makes them at its first step
                    state[name] = moment.to(main.device, copy=True)

    def spread_weights(self) -> None:
        """Bring the master weights to the model of every data-parallel rank, as after a step. A collective."""
        for optimizer in self._megatron.chained_optimizers:
            optimizer._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def continue_after(self, step: int, updates: int) -> None:
        """Let the learning rate go on as after `step` steps, and Adam's bias correction as after `updates` of them."""
        self.updates_done = updates
        self._schedule.num_steps = 0
        self._schedule.step(step)
        for optimizer in set(self._updater.values()):
            for group in optimizer.optimizer.param_groups:
                if isinstance(optimizer.optimizer, torch.optim.AdamW):  # counts for each parameter
                    for main in group["params"]:
                        optimizer.optimizer.state[main]["step"] = torch.tensor(float(updates))
                else:  # the fused ones count for each group
                    group["step"] = updates

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return self._updater[parameter]._get_main_param_and_optimizer_states(parameter)


def _gradient(shard: Tensor) -> Tensor:
    assert shard.grad is not None, "between `gradient_norm` and `clip_and_step`"
    return shard.grad

"""The sharded optimizer: each data-parallel rank updates a shard of every parameter (ZeRO-1).

It wraps megatron-core's DistributedOptimizer. Only this module uses what lies beyond megatron-core's documented
interface. Line numbers are those of megatron-core 0.16.1, paths are relative to megatron/core:

optimizer/distrib_optimizer.py
    174 _build_model_gbuf_range: the elements of a bucket that a data-parallel rank updates
    528 is_stub_optimizer: whether the optimizer has nothing to update
    571 model_param_gbuf_map: the parameters of which this rank updates elements
    610 _get_model_param_range_map: the elements of a parameter that this rank updates
    883 _get_main_param_and_optimizer_states: their master weights and Adam's moments
    2429 _copy_main_params_to_model_params: copy master weights to this rank's shards of the model's weights
optimizer/optimizer.py
    185 prepare_grads: copy the model's gradients to `grad` of the master weights
    136 get_main_grads_for_grad_norm: the gradients that count in the norm
    164 get_grad_stats_parallel_group: the ranks over which their squares are summed
    190 step_with_ready_grads: update, and start the all-gather of the weights
    1105 chained_optimizers: one for each group of parameters that has its own process groups
distributed/distributed_data_parallel.py
    291 buffers: the buffers of parameters and gradients
    463 start_param_sync: all-gather the shards of the model's weights over data-parallel ranks
distributed/param_and_grad_buffer.py
    631 buckets: the parts of a buffer that are reduced and gathered together
    633 param_index_map: the place of each parameter in a buffer (start, end, bucket)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from griffin.parallel import megatron_device
from griffin.parallel.stage import Stage
from griffin.parallel.world.grid import Grid
from griffin.trainer.measuring.figures import is_counted, squares_by_kind
from griffin.trainer.optimizer import build_optimizer, build_schedule
from griffin.trainer.settings.sections import Config


def overlaps_communication(config: Config, data_size: int, *, on_gpu: bool) -> bool:
    """Whether data-parallel communication overlaps with computation. A CUDA graph cannot wait for what is not in it."""
    automatic = config.train.overlap == "auto" and on_gpu and not config.train.cuda_graphs
    return data_size > 1 and (config.train.overlap == "on" or automatic)


def wrap_in_ddp(stages: Sequence[Stage], overlap: bool) -> list[DistributedDataParallel]:
    """Wrap the stages of a rank in megatron-core's DistributedDataParallel, with gradients reduced in float32.

    Their parameters move into its buffers, of which each data-parallel rank updates a shard.
    """
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
            disable_bucketing=index > 0,
        )
        for index, stage in enumerate(stages)
    ]


def shard_ranges(
    chunks: Sequence[DistributedDataParallel], data_rank: int, data_size: int
) -> dict[nn.Parameter, tuple[int, int]]:
    """Elements [start, stop) of each flattened parameter that data-parallel rank `data_rank` of `data_size` updates.

    This is for planning: it needs no optimizer, and the parameters may be meta tensors.
    """
    ranges: dict[nn.Parameter, tuple[int, int]] = {}
    for chunk in chunks:
        for buffer in chunk.buffers:
            index_maps: list[dict[nn.Parameter, tuple[int, int, int]]] = [{} for _ in buffer.buckets]
            for parameter, place in buffer.param_index_map.items():
                index_maps[place[2]][parameter] = place
            for bucket, index_map in enumerate(index_maps):
                # What the optimizer of that rank reads of the buffer, with the parameters of this bucket only.
                view = SimpleNamespace(
                    data_parallel_group=SimpleNamespace(rank=lambda: data_rank, size=lambda: data_size),
                    buckets=buffer.buckets,
                    param_index_map=index_map,
                )
                found = DistributedOptimizer._build_model_gbuf_range(view, bucket)["param_map"]
                ranges |= {
                    parameter: (extent["param"].start, extent["param"].end) for parameter, extent in found.items()
                }
    return ranges


class ShardedOptimizer:
    """AdamW with float32 master weights and a learning-rate schedule, for the parameters of `chunks`.

    The order of calls in a step is `zero_gradients`, forward and backward passes, `gradient_norm_square`,
    `advance_schedule` and, unless the update is skipped, `clip_and_step`.
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
        self.updates_done = 0  # steps whose update was not skipped

    @property
    def param_groups(self) -> list[dict]:
        """The parameter groups, as in a PyTorch optimizer: this rank's master weights and their settings."""
        return self._megatron.param_groups

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step; 0.0 before the first step if there is a warm-up."""
        return self._megatron.param_groups[0]["lr"]

    def zero_gradients(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._megatron.zero_grad()

    def gradient_norm_square(self) -> Tensor:
        """Squared norm of the reduced gradient of the whole model, before clipping: float32 [], on the device.

        A collective, which does not wait for the device. (megatron-core's does, without Apex once a parameter.)

        It copies the gradients to `grad` of the master weights, where they stay until `clip_and_step`.
        """
        with megatron_device.cuda_type_names():
            self._megatron.prepare_grads()
        gradients = [
            gradient
            for optimizer in self._megatron.chained_optimizers
            for gradient in optimizer.get_main_grads_for_grad_norm()
        ]
        square = torch.zeros((), device=self._grid.device)
        if gradients:
            square = get_total_norm(gradients).square()
        dist.all_reduce(square, group=self._megatron.get_grad_stats_parallel_group())
        return square

    def advance_schedule(self) -> None:
        """Set the learning rate of this step's update. Call it for steps whose update is skipped, too."""
        self._schedule.step(1)

    def clip_and_step(self, norm: float) -> None:
        """Clip the gradient, whose norm is `norm`, to `optimizer.clip`, and update the weights. A collective."""
        with megatron_device.cuda_type_names():
            if self._clip > 0:
                for optimizer in self._megatron.chained_optimizers:
                    clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm=self._clip, total_norm=norm)
            self._megatron.step_with_ready_grads()
        self.updates_done += 1

    def gradient_squares(self) -> Tensor:
        """Sums of squares of this rank's shards of the gradients, float64 [kinds] (see `figures.squares_by_kind`).

        Call it between `gradient_norm_square` and `clip_and_step`, which scales the gradients in place.
        """
        return self._squares(_gradient)

    def weight_squares(self) -> Tensor:
        """Sums of squares of this rank's shards of master weights, float64 [kinds] (see `figures.squares_by_kind`)."""
        return self._squares(torch.Tensor.detach)

    def _squares(self, value_of: Callable[[Tensor], Tensor]) -> Tensor:
        counted = [parameter for parameter in self._updater if is_counted(parameter, self._grid)]
        return squares_by_kind(
            ((parameter, value_of(self._state(parameter)["param"])) for parameter in counted), self._grid.device
        )

    def shard_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Elements [start, stop) of the flattened parameter that this rank updates; (0, 0) if none."""
        optimizer = self._updater.get(parameter)
        if optimizer is None:
            return 0, 0
        extent = optimizer._get_model_param_range_map(parameter)["param"]
        return extent.start, extent.end

    def shard_state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """(master weights, Adam's first and second moments) of `shard_range`, float32 [stop - start] each, not copied.

        Moments are None before the first step. Returns None if this rank updates no element of the parameter.
        """
        if parameter not in self._updater:
            return None
        state = self._state(parameter)
        return state["param"], state.get("exp_avg"), state.get("exp_avg_sq")

    def set_shard_state(self, parameter: nn.Parameter, master: Tensor, moments: Tensor | None) -> None:
        """Overwrite what `shard_state` returns; `moments` is float32 [2, stop - start], or None to leave them.

        Afterwards call `gather_weights`, which updates the model, and `continue_after`, which sets the step counts.
        """
        main = self._state(parameter)["param"]
        main.copy_(master)
        if moments is not None:
            state = self._updater[parameter].optimizer.state[main]
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                if name in state:
                    state[name].copy_(moment)
                else:  # Adam creates its moments in its first step
                    state[name] = moment.to(main.device, copy=True)

    def gather_weights(self) -> None:
        """Copy the master weights to the model on every data-parallel rank, as after a step. A collective."""
        for optimizer in self._megatron.chained_optimizers:
            optimizer._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def continue_after(self, step: int, updates: int) -> None:
        """Set the schedule to `step` steps done, and Adam's bias correction to `updates` updates done."""
        self.updates_done = updates
        self._schedule.num_steps = 0
        self._schedule.step(step)
        for optimizer in set(self._updater.values()):
            for group in optimizer.optimizer.param_groups:
                if isinstance(optimizer.optimizer, torch.optim.AdamW):  # counts per parameter
                    for main in group["params"]:
                        optimizer.optimizer.state[main]["step"] = torch.tensor(float(updates))
                else:  # the fused optimizers count per group
                    group["step"] = updates

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return self._updater[parameter]._get_main_param_and_optimizer_states(parameter)


def _gradient(shard: Tensor) -> Tensor:
    assert shard.grad is not None, "call between `gradient_norm_square` and `clip_and_step`"
    return shard.grad

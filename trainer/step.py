"""One training step: schedule of micro-batches -> gradients -> checks -> optimizer (and the same without gradients)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from griffin.parallel import host
from griffin.parallel.gradients import finalize_gradients
from griffin.parallel.sharding import initialize
from griffin.parallel.stage import Stage, build_stages
from griffin.parallel.world.grid import Grid
from griffin.parallel.world.ranks import RunError
from griffin.trainer.health.replicas import check_replicas
from griffin.trainer.health.spikes import Spike
from griffin.trainer.measuring import norms as measures
from griffin.trainer.measuring.clock import StepClock, StepTimes
from griffin.trainer.measuring.rglru_health import Health, Observation
from griffin.trainer.optimizer import build_optimizer, build_schedule
from griffin.trainer.settings.sections import Config

Batch = Mapping[str, Tensor]


class NonFiniteError(RunError):
    """The loss or a gradient is NaN or infinite. Raised on every rank before the optimizer changes a weight."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, the same on every rank but for `times`. `loss` is in nats per unmasked token over the global
    batch."""

    loss: float
    grad_norm: float  # before clipping, over the whole model
    learning_rate: float
    loss_tokens: int  # unmasked tokens
    stop: bool  # some rank was asked to stop
    times: StepTimes  # of this rank
    spike: Spike | None  # for which no weight was changed
    measured: Mapping[str, float]  # figures by name; empty where they were not asked for
    work: Sequence[float] | None  # every rank's seconds of own work per step, where figures were asked for
    health: Health | None  # of the RG-LRU, where it was asked for


class Training:
    """The model of this rank with its optimizer: call `step` with micro-batches, in order.

    Weights are drawn from `train.seed`, the same whatever the layout.
    """

    def __init__(self, config: Config, grid: Grid):
        self.config, self.grid = config, grid
        self.dtype: torch.dtype = getattr(torch, config.train.dtype)
        self.micro_batches = config.train.global_batch // (config.train.micro_batch * grid.data_size)
        self.overlap = overlaps(config, grid.data_size, on_gpu=grid.device.type == "cuda")
        stages = build_stages(
            config.model,
            config.parallel,
            grid,
            dtype=self.dtype,
            sequence=config.data.sequence_length,
            recompute=config.train.recompute,
            kernels=config.train.kernels,
        )
        initialize(stages, grid, config.train.seed)
        self.stages: list[Stage] = stages
        self.chunks = in_buffers(stages, self.overlap)
        self.optimizer = build_optimizer(config, self.chunks, self.dtype, overlap=self.overlap)
        self.schedule = build_schedule(config, self.optimizer)
        self._updater = {
            parameter: optimizer
            for optimizer in self.optimizer.chained_optimizers
            if not optimizer.is_stub_optimizer
            for parameter in optimizer.model_param_gbuf_map
        }
        megatron = stages[0].config
        self.clock = StepClock(grid.device)
        megatron.timers = self.clock.work
        megatron.finalize_model_grads_func = self.clock.before_reduction(finalize_gradients(grid))
        if self.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            megatron.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
        self._forward_backward = get_forward_backward_func()
        self.steps_done = 0
        self.updates_done = 0  # of the optimizer: the steps without spikes

    def step(
        self,
        batches: Iterator[Batch],
        *,
        stop: bool = False,
        judge: Callable[[float, float], Spike | None] | None = None,
        measure: bool = False,
        health: bool = False,
    ) -> StepResult:
        """One optimizer step on the next micro-batches (maps of int64 and float32 [B, T], see `trainer.data`).

        `stop` tells that this rank was asked to stop; the result says so on every rank if any rank was. All other
        arguments are the same on every rank. `judge` is asked of loss and gradient norm whether the step is a spike:
        the optimizer is then left as it was, while the schedule goes on. `measure` asks for the result's `measured` and
        `work`, and `health` for its `health`; the weights become the same bits with and without.

        Raises NonFiniteError, with all weights as they were, if the loss or the gradient is not finite and there is no
        `judge`; and ReplicaError where copies of a weight differ, every `health.replica_interval` steps.
        """
        number, spike = self.steps_done + 1, None
        self.clock.begin()
        observation = Observation()
        with observation.of(self.stages if health else ()), self.clock.work.running():
            loss, tokens, stops = self._gradients(self.clock.timed(batches), stop)
        self.clock.gradients_done()
        interval = self.config.health.replica_interval
        if interval > 0 and number % interval == 0:
            check_replicas(self.stages, self.grid, number)
        own = self.clock.take() if measure else None
        with host.cuda_type_names():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if judge is not None:
                spike = judge(loss, grad_norm)
                assert is_finite or spike is not None, "what is not finite is a spike"
            if not is_finite:
                text = f"loss {loss}, gradient norm {grad_norm}; {self._not_finite()}"
                if spike is None:
                    raise NonFiniteError(f"step {number}: {text}. No weight was changed.")
                spike = replace(spike, text=text)
            # Here: clipping changes the gradients in place.
            gradients = self._squares(gradient=True) if measure else None
            self.schedule.step(1)
            if spike is None:
                if self.config.optimizer.clip > 0:
                    for optimizer in self.optimizer.chained_optimizers:
                        clip_grad_by_total_norm_fp32(
                            optimizer.get_parameters(), max_norm=self.config.optimizer.clip, total_norm=grad_norm
                        )
                self.optimizer.step_with_ready_grads()
                self.updates_done += 1
        self.steps_done = number
        times = self.clock.end()
        measured: Mapping[str, float] = {}
        work: Sequence[float] | None = None
        if own is not None and gradients is not None:
            weights = self._squares(gradient=False)
            measured, work = measures.combine(
                self.grid, self.config.model, gradients=gradients, parameters=weights, own=own
            )
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            loss_tokens=tokens,
            stop=stops,
            times=times,
            spike=spike,
            measured=measured,
            work=work,
            health=observation.combined(self.config.model, self.grid.device) if health and is_finite else None,
        )

    def _squares(self, *, gradient: bool) -> Tensor:
        """Of this rank's shards of the gradients that the optimizer is about to use, or of the master weights."""
        counted = [parameter for parameter in self._updater if measures.counts_once(parameter, self.grid)]
        shards = [
            self._updater[parameter]._get_main_param_and_optimizer_states(parameter)["param"] for parameter in counted
        ]
        parts = [shard.grad if gradient else shard.detach() for shard in shards]
        return measures.squares(zip(counted, parts, strict=True), self.grid.device)

    def gradients(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Mean loss and number of unmasked tokens of the next global batch; parameters' `main_grad` is its gradient.

        Of `main_grad`, a data-parallel rank holds the reduced values of its own shard only.
        """
        return self._gradients(batches, stop=False)[:2]

    def _gradients(self, batches: Iterator[Batch], stop: bool) -> tuple[float, int, bool]:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, self.micro_batches, forward_only=False, stop=stop)

    def shard_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Elements [start, stop) of the flattened parameter that this rank's optimizer updates; (0, 0) is none."""
        optimizer = self._updater.get(parameter)
        if optimizer is None:
            return 0, 0
        extent = optimizer._get_model_param_range_map(parameter)["param"]
        return extent.start, extent.end

    def shard_state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Master weights and Adam's moments of those elements, float32 [stop - start] each, not copied.

        Moments are None before the first step; all is None where this rank updates nothing of the parameter.
        """
        optimizer = self._updater.get(parameter)
        if optimizer is None:
            return None
        state = optimizer._get_main_param_and_optimizer_states(parameter)
        return state["param"], state.get("exp_avg"), state.get("exp_avg_sq")

    def set_shard_state(self, parameter: nn.Parameter, master: Tensor, moments: Tensor | None) -> None:
        """Replace what `shard_state` gives; `moments` is float32 [2, stop - start], or None for those of a new run.

        The model has the weights after `spread_weights`, and Adam counts on after `continue_after`.
        """
        optimizer = self._updater[parameter]
        main = optimizer._get_main_param_and_optimizer_states(parameter)["param"]
        main.copy_(master)
        if moments is not None:
            state = optimizer.optimizer.state[main]
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                if name in state:
                    state[name].copy_(moment)
                else:  # Adam makes them at its first step
                    state[name] = moment.to(main.device, copy=True)

    def spread_weights(self) -> None:
        """Bring the master weights to the model of every data-parallel rank, as after a step. A collective."""
        for optimizer in self.optimizer.chained_optimizers:
            optimizer._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)

    def continue_after(self, step: int, updates: int) -> None:
        """Let the learning rate go on as after `step` steps, and Adam's bias correction as after `updates` of them."""
        self.steps_done, self.updates_done = step, updates
        self.schedule.num_steps = 0
        self.schedule.step(step)
        for optimizer in set(self._updater.values()):
            for group in optimizer.optimizer.param_groups:
                if isinstance(optimizer.optimizer, torch.optim.AdamW):  # counts for each parameter
                    for main in group["params"]:
                        optimizer.optimizer.state[main]["step"] = torch.tensor(float(updates))
                else:  # the fused ones count for each group
                    group["step"] = updates

    def evaluate(self, batches: Iterator[Batch], global_batches: int) -> tuple[float, int]:
        """Mean loss (nats per unmasked token) over the next global batches, without gradients, and those tokens."""
        for chunk in self.chunks:
            chunk.eval()
            if self.overlap:
                chunk.disable_forward_pre_hook()
        with torch.no_grad():
            loss, tokens, _ = self._run(batches, self.micro_batches * global_batches, forward_only=True)
        if self.overlap:
            for chunk in self.chunks:
                chunk.enable_forward_pre_hook()
        return loss, tokens

    def _run(
        self, batches: Iterator[Batch], micro_batches: int, *, forward_only: bool, stop: bool = False
    ) -> tuple[float, int, bool]:
        """megatron-core's schedule over micro-batches; on every rank the mean loss, the number of unmasked tokens, and
        whether any rank's `stop` is set."""
        here = itertools.islice(batches, micro_batches)
        losses = self._forward_backward(
            forward_step_func=self._forward,
            data_iterator=list(itertools.tee(here, len(self.chunks))) if len(self.chunks) > 1 else here,
            model=self.chunks,
            num_microbatches=micro_batches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.train.micro_batch,
            forward_only=forward_only,
        )
        total = torch.zeros(3, dtype=torch.float64, device=self.grid.device)
        if self.grid.is_last_stage and self.grid.tensor_rank == 0:
            for loss in losses:
                total[:2] += loss
        if stop:
            total[2] = 1
        dist.all_reduce(total)
        loss_sum, tokens, stops = total.tolist()
        return loss_sum / max(tokens, 1.0), int(tokens), stops > 0

    def _forward(self, batches: Iterator[Batch], chunk: DistributedDataParallel) -> tuple[Tensor, partial]:
        batch = {name: value.to(self.grid.device, non_blocking=True) for name, value in next(batches).items()}
        return chunk(batch), partial(_loss, batch["loss_mask"])

    def _not_finite(self) -> str:
        """Which gradient is not finite, and on which ranks: the same on every rank. A collective."""
        mine = [
            (place, piece.name)
            for place, (piece, parameter) in enumerate(
                (piece, parameter)
                for stage in self.stages
                for parameter in stage.parameters()
                for piece in parameter.pieces
            )
            if not piece.view(parameter.main_grad, self.grid.tensor_size).isfinite().all()
        ]
        found = self.grid.all_gather((self.grid.pipeline_rank, mine), tuple[int, list[tuple[int, str]]])
        offenders = sorted((_model_order(name), name) for _, names in found for _, name in names)
        if not offenders:
            return "every gradient is finite"
        name = offenders[0][1]
        ranks = [rank for rank, (_, names) in enumerate(found) if name in {n for _, n in names}]
        return (
            f"the first non-finite gradient is that of {name} on rank{'s' * (len(ranks) > 1)} "
            f"{', '.join(map(str, ranks))} ({len({n for _, n in offenders})} parameters in all)"
        )


def overlaps(config: Config, data_size: int, *, on_gpu: bool) -> bool:
    """Whether data-parallel communication goes on behind computation."""
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


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of unmasked losses, their number, both for logging) of a micro-batch; mask [B, T], losses [T, B]."""
    mask = mask.t()
    total, tokens = (losses * mask).sum(), mask.sum()
    # A clone: the schedule may scale the first in place.
    return total, tokens.int(), torch.stack((total.detach().clone(), tokens)).double()


def _model_order(name: str) -> tuple[int, str]:
    """Sorts parameter names from the input to the output of the model."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return int(parts[1]), name
    return (-1 if parts[0] == "embedding" else 1 << 30), name

"""One training step: schedule of micro-batches -> gradients -> checks -> optimizer (and the same without gradients)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from griffin.parallel.gradients import finalize_gradients
from griffin.parallel.sharding import initialize
from griffin.parallel.stage import Stage, build_stages
from griffin.parallel.vocabulary_loss import Loss
from griffin.parallel.world.grid import Grid
from griffin.trainer.health.non_finite import NonFiniteError, describe_non_finite
from griffin.trainer.health.replicas import check_replicas
from griffin.trainer.health.spikes import Spike
from griffin.trainer.measuring import norms
from griffin.trainer.measuring.clock import StepClock, StepTimes
from griffin.trainer.measuring.rglru_health import Health, Observation
from griffin.trainer.settings.sections import Config
from griffin.trainer.sharded_optimizer import ShardedOptimizer, in_buffers, overlaps

Batch = Mapping[str, Tensor]


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
            z_loss=config.train.z_loss,
        )
        initialize(stages, grid, config.train.seed)
        self.stages: list[Stage] = stages
        self.chunks = in_buffers(stages, self.overlap)
        self.optimizer = ShardedOptimizer(config, grid, self.chunks, dtype=self.dtype, overlap=self.overlap)
        megatron = stages[0].config
        self.clock = StepClock(grid.device)
        megatron.timers = self.clock.work
        megatron.finalize_model_grads_func = self.clock.before_reduction(finalize_gradients(grid))
        if self.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            megatron.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
        self._forward_backward = get_forward_backward_func()
        self.steps_done = 0

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
        number = self.steps_done + 1
        self.clock.begin()
        observation = Observation()
        with observation.of(self.stages if health else ()), self.clock.work.running():
            loss, tokens, stops = self._gradients(self.clock.timed(batches), stop)
        self.clock.gradients_done()

        interval = self.config.health.replica_interval
        if interval > 0 and number % interval == 0:
            check_replicas(self.stages, self.grid, number)
        own = self.clock.take() if measure else None
        grad_norm = self.optimizer.gradient_norm()
        spike, is_finite = self._inspect(number, loss, grad_norm, judge)
        # Here: clipping changes the gradients in place.
        gradients = self.optimizer.gradient_squares() if measure else None

        self.optimizer.advance_schedule()
        if spike is None:
            self.optimizer.clip_and_step(grad_norm)
        self.steps_done = number
        times = self.clock.end()

        measured: Mapping[str, float] = {}
        work: Sequence[float] | None = None
        if own is not None and gradients is not None:
            weights = self.optimizer.weight_squares()
            measured, work = norms.combine(
                self.grid, self.config.model, gradients=gradients, parameters=weights, own=own
            )
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self.optimizer.learning_rate,
            loss_tokens=tokens,
            stop=stops,
            times=times,
            spike=spike,
            measured=measured,
            work=work,
            health=observation.combined(self.config.model, self.grid.device) if health and is_finite else None,
        )

    def _inspect(
        self, number: int, loss: float, grad_norm: float, judge: Callable[[float, float], Spike | None] | None
    ) -> tuple[Spike | None, bool]:
        """The spike that `judge` finds step `number` to be, and whether loss and gradient norm are finite.

        Raises NonFiniteError where they are not and there is no `judge`.
        """
        spike = judge(loss, grad_norm) if judge is not None else None
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return spike, True
        assert judge is None or spike is not None, "what is not finite is a spike"
        text = f"loss {loss}, gradient norm {grad_norm}; {describe_non_finite(self.stages, self.grid)}"
        if spike is None:
            raise NonFiniteError(f"step {number}: {text}. No weight was changed.")
        return replace(spike, text=text), False

    def gradients(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Mean loss and number of unmasked tokens of the next global batch; parameters' `main_grad` is its gradient.

        Of `main_grad`, a data-parallel rank holds the reduced values of its own shard only.
        """
        return self._gradients(batches, stop=False)[:2]

    def _gradients(self, batches: Iterator[Batch], stop: bool) -> tuple[float, int, bool]:
        for chunk in self.chunks:
            chunk.train()
        self.optimizer.zero_gradients()
        return self._run(batches, self.micro_batches, forward_only=False, stop=stop)

    def continue_after(self, step: int, updates: int) -> None:
        """Go on as after `step` steps, of which `updates` changed the weights."""
        self.steps_done = step
        self.optimizer.continue_after(step, updates)

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


def _loss(mask: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum of losses, their number; both for logging, without z-loss) of a micro-batch; mask [B, T]."""
    mask = mask.t()
    tokens = mask.sum()
    return loss.total, tokens.int(), torch.stack(((loss.tokens * mask).sum(), tokens)).double()

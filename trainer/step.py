"""One training step: gradients -> inspect -> update -> measure. And the loss without gradients, for evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from griffin.parallel.context import to_device
from griffin.parallel.gradients import finalize_gradients
from griffin.parallel.layers.loss import Loss
from griffin.parallel.sharding import initialize
from griffin.parallel.stage import Stage, build_stages
from griffin.parallel.world.grid import Grid
from griffin.trainer.graph import GraphedPasses, attention_backend
from griffin.trainer.health.non_finite import NonFiniteError, describe_non_finite
from griffin.trainer.health.replicas import Comparison, compare_replicas
from griffin.trainer.health.spikes import Spike
from griffin.trainer.host import to_host
from griffin.trainer.measuring.clock import StepClock, StepTimes
from griffin.trainer.measuring.figures import figures_of, gather_rows
from griffin.trainer.measuring.rglru_health import Health, Observation
from griffin.trainer.settings.sections import Config
from griffin.trainer.sharded_optimizer import ShardedOptimizer, overlaps_communication, wrap_in_ddp

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of a step. All fields but `times` are the same on every rank."""

    loss: float  # nats per unmasked token, mean over the global batch
    grad_norm: float  # of the whole model, before clipping
    learning_rate: float
    loss_tokens: int  # unmasked tokens
    stop: bool  # some rank was asked to stop
    times: StepTimes  # of this rank
    spike: Spike | None  # if not None, the update was skipped
    measured: Mapping[str, float]  # figures by name; empty unless asked for
    work: Sequence[float] | None  # seconds per step of each rank's own work; None unless asked for
    health: Health | None  # of the RG-LRU; None unless asked for


class Training:
    """The model shard and optimizer of this rank. Call `step` once per optimizer step.

    Initial weights depend on `train.seed` only: they are the same in every parallel layout.
    """

    def __init__(self, config: Config, grid: Grid):
        self.config, self.grid = config, grid
        self.dtype: torch.dtype = getattr(torch, config.train.dtype)
        self.micro_batches = config.train.global_batch // (config.train.micro_batch * grid.data_size)
        self.overlap = overlaps_communication(config, grid.axes.replicas, on_gpu=grid.device.type == "cuda")
        self.steps_done = 0

        self.stages: list[Stage] = build_stages(
            config.model,
            config.parallel,
            grid,
            dtype=self.dtype,
            sequence=config.data.sequence_length,
            recompute=config.train.recompute,
            kernels=config.train.kernels,
            attention=attention_backend(config.train),
            z_loss=config.train.z_loss,
        )
        initialize(self.stages, grid, config.train.seed)
        self._schedule = get_forward_backward_func()
        self._graphed = GraphedPasses(self._schedule, grid.device) if config.train.cuda_graphs else None
        with self._graphed.stream() if self._graphed is not None else nullcontext():
            self.chunks = wrap_in_ddp(self.stages, self.overlap)  # megatron-core's model chunks
        self.optimizer = ShardedOptimizer(config, grid, self.chunks, dtype=self.dtype, overlap=self.overlap)

        # megatron-core's schedule calls these between its passes.
        self.clock = StepClock(grid.device)
        megatron = self.stages[0].config
        megatron.timers = self.clock.work
        megatron.finalize_model_grads_func = self.clock.before_reduction(finalize_gradients(grid))
        if self.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            megatron.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync

    def step(
        self,
        batches: Iterator[Batch],
        *,
        stop: bool = False,
        detect_spike: Callable[[float, float], Spike | None] | None = None,
        measure: bool = False,
        health: bool = False,
    ) -> StepResult:
        """Take one optimizer step on the next micro-batches. A collective of all ranks.

        The host waits for the device once, before it decides on the update; and once more at the end to measure.

        Args:
            batches: this rank's micro-batches, dicts of int64 and float32 [B, T] (see `trainer.data.loader`).
            stop: whether this rank was asked to stop. `StepResult.stop` is then True on every rank. The arguments below
                must be the same on every rank.
            detect_spike: returns the spike for a loss and a gradient norm, if they are one. The update is then skipped;
                the schedule advances all the same.
            measure: fill `StepResult.measured` and `work`. This changes no bit of the weights.
            health: fill `StepResult.health`. This changes no bit of the weights. Not with `train.cuda_graphs`, which
                leaves `work` None.

        Raises:
            NonFiniteError: the loss or the gradient is not finite, and there is no `detect_spike`. No weight changes.
            ReplicaError: copies of a weight differ; checked every `health.replica_interval` steps. No weight changes.
        """
        number = self.steps_done + 1
        self.clock.begin()

        # Gradients.
        observation = Observation()
        graphed = self._graphed is not None
        assert not (graphed and health), "a graph calls no observers"
        with observation.of(self.stages if health else ()), nullcontext() if graphed else self.clock.work.running():
            totals = self._gradients(self.clock.timed(batches), stop)
        self.clock.gradients_done()

        # Inspect.
        replicas = self._compare_replicas(number)
        norm_square = self.optimizer.gradient_norm_square()
        with self.clock.waiting_for_device():
            totals, norm_square, differ = to_host(totals, norm_square, replicas.differ)
        if differ.item():
            replicas.fail(number)
        loss, tokens, stops = _result(totals)
        grad_norm = norm_square.item() ** 0.5
        rank_times = self.clock.take() if measure else None
        spike, is_finite = self._inspect(number, loss, grad_norm, detect_spike)
        gradient_squares = self.optimizer.gradient_squares() if measure else None  # clipping scales them in place

        # Update.
        self.optimizer.advance_schedule()
        if spike is None:
            self.optimizer.clip_and_step(grad_norm)
        self.steps_done = number
        times = self.clock.end()

        # Measure.
        measured: Mapping[str, float] = {}
        work: Sequence[float] | None = None
        rglru: Health | None = None
        if measure or (health and is_finite):
            none = totals.new_empty(0, device=self.grid.device)
            rows = gates = none
            if rank_times is not None and gradient_squares is not None:
                rows = gather_rows(self.grid, gradient_squares, self.optimizer.weight_squares(), rank_times)
            if health and is_finite:
                gates = observation.summed(self.config.model, self.grid.device)
            rows, gates = to_host(rows, gates)
            if measure:
                measured, work = figures_of(rows, self.grid, self.config.model, has_work=not graphed)
            if health and is_finite:
                rglru = Health.of(gates, self.config.model)
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
            health=rglru,
        )

    def _compare_replicas(self, number: int) -> Comparison:
        interval = self.config.health.replica_interval
        return compare_replicas(self.stages if interval > 0 and number % interval == 0 else (), self.grid)

    def _inspect(
        self, number: int, loss: float, grad_norm: float, detect_spike: Callable[[float, float], Spike | None] | None
    ) -> tuple[Spike | None, bool]:
        """The spike that `detect_spike` finds in step `number`, if any, and whether loss and gradient norm are finite.

        Raises NonFiniteError if they are not and there is no `detect_spike`.
        """
        spike = detect_spike(loss, grad_norm) if detect_spike is not None else None
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return spike, True
        assert detect_spike is None or spike is not None, "a loss or norm that is not finite is a spike"
        text = f"loss {loss}, gradient norm {grad_norm}; {describe_non_finite(self.stages, self.grid)}"
        if spike is None:
            raise NonFiniteError(f"step {number}: {text}. No weight was changed.")
        return replace(spike, text=text), False

    def gradients(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Compute the gradients of the next global batch into the parameters' `main_grad`, without an update.

        Returns the mean loss and the number of unmasked tokens. A data-parallel rank holds the reduced values of
        `main_grad` for its own shard only.
        """
        return _result(*to_host(self._gradients(batches, stop=False)))[:2]

    def _gradients(self, batches: Iterator[Batch], stop: bool) -> Tensor:
        for chunk in self.chunks:
            chunk.train()
        self.optimizer.zero_gradients()
        return self._run(batches, self.micro_batches, forward_only=False, stop=stop)

    def continue_after(self, step: int, updates: int) -> None:
        """Resume after `step` steps, of which `updates` changed the weights."""
        self.steps_done = step
        self.optimizer.continue_after(step, updates)

    def evaluate(self, batches: Iterator[Batch], global_batches: int) -> tuple[float, int]:
        """Mean loss (nats per unmasked token) of the next global batches and their number of unmasked tokens.

        No gradients are computed, and no weight changes. A collective of all ranks.
        """
        for chunk in self.chunks:
            chunk.eval()
            if self.overlap:
                chunk.disable_forward_pre_hook()
        with torch.no_grad():
            totals = self._run(batches, self.micro_batches * global_batches, forward_only=True)
        if self.overlap:
            for chunk in self.chunks:
                chunk.enable_forward_pre_hook()
        return _result(*to_host(totals))[:2]

    def _run(self, batches: Iterator[Batch], micro_batches: int, *, forward_only: bool, stop: bool = False) -> Tensor:
        """Run megatron-core's pipeline schedule over the next micro-batches.

        Returns float64 [3] on the device, the same on every rank: the sum of losses, the number of unmasked tokens, and
        the number of ranks on which `stop` is set.
        """
        next_batches = itertools.islice(batches, micro_batches)
        run: Callable[..., list[Tensor]] = (
            self._graphed if self._graphed is not None and not forward_only else self._schedule
        )
        losses = run(
            forward_step_func=self._forward,
            data_iterator=(
                list(itertools.tee(next_batches, len(self.chunks))) if len(self.chunks) > 1 else next_batches
            ),
            model=self.chunks,
            num_microbatches=micro_batches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.train.micro_batch,
            forward_only=forward_only,
        )
        total = torch.zeros(3, dtype=torch.float64, device=self.grid.device)
        if self.grid.reports_loss:
            for loss in losses:
                total[:2] += loss
        if stop:
            total[2] = 1
        dist.all_reduce(total)
        return total

    def _forward(self, batches: Iterator[Batch], chunk: DistributedDataParallel) -> tuple[Tensor, partial]:
        batch = to_device(next(batches), self.grid.device)
        return chunk(batch), partial(masked_loss, batch["loss_mask"])


def _result(totals: Tensor) -> tuple[float, int, bool]:
    """The mean loss, the number of unmasked tokens, and whether a rank is to stop, of what `Training._run` returns."""
    loss_sum, tokens, stops = totals.tolist()
    return loss_sum / max(tokens, 1.0), int(tokens), stops > 0


def masked_loss(mask: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum of losses, number of tokens; both for logging, without z-loss) of a micro-batch; mask [B, T]."""
    mask = mask.t()
    tokens = mask.sum()
    return loss.total, tokens.int(), torch.stack(((loss.tokens * mask).sum(), tokens)).double()

"""The training loop, as every rank runs it: take a step, log, save, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from griffin.kernels import local_attention
from griffin.kernels.selection import resolve_backend
from griffin.parallel.world.grid import Grid, rank_grid
from griffin.parallel.world.ranks import Ranks, RunError
from griffin.trainer.checkpoint.checkpoints import Checkpoints, Position
from griffin.trainer.checkpoint.source import InitFrom, Source, find_source, refuse_other_model
from griffin.trainer.checkpoint.steps import clean
from griffin.trainer.checkpoint.unreadable import record_skipped, recording_failure
from griffin.trainer.data.dataset import Samples, build_index, open_samples
from griffin.trainer.data.loader import batches, watching_workers
from griffin.trainer.evaluation import Evaluation, held_out_loss
from griffin.trainer.graph import attention_backend, check_graphs
from griffin.trainer.health.spikes import REWIND, SKIP, Spike, SpikeDetector, SpikeError, SpikeLedger
from griffin.trainer.health.stragglers import Stragglers
from griffin.trainer.health.watchdog import Watchdog, communication_timeout
from griffin.trainer.measuring.profile import FOLDER, StepProfiler
from griffin.trainer.optimizer import optimizer_name
from griffin.trainer.preflight.check import preflight
from griffin.trainer.reporting.report import Report
from griffin.trainer.run.attempts import Attempt
from griffin.trainer.run.folder import RunFolder, describe_environment
from griffin.trainer.run.garbage import collected_at_steps
from griffin.trainer.run.lock import RunLock
from griffin.trainer.run.signals import StopRequests
from griffin.trainer.run.tokenizer_copy import copy_tokenizer
from griffin.trainer.settings.sections import Config, OptimizerConfig
from griffin.trainer.step import Batch, StepResult, Training


def train(config: Config, ranks: Ranks, run_dir: Path, init_from: InitFrom | None = None) -> bool:
    """Train a validated config on all ranks; rank 0 writes `run_dir`. Returns True if the run was stopped on request.

    The run resumes from the newest checkpoint in `run_dir`; without one it starts from `init_from`, or else from newly
    initialized weights (see `find_source`). After SIGTERM or SIGUSR1 to any rank, all ranks stop after the same step,
    which is saved. If the run hangs, the process exits with HUNG (see `trainer.health.watchdog`).

    Raises:
        PreflightError: a rank's machine or links are not fit for training (see `trainer.preflight.check`).
        NonFiniteError: the loss or a gradient is NaN or infinite, and `train.spike` is off.
        SpikeError: there were more spikes than `train.spike_limit` allows.
        ReplicaError: copies of a weight differ between ranks.
        WorkerError: a data loader process has died.
        CheckpointError: the checkpoint that the run starts from is damaged.
        SaveError: the final state could not be saved.
    """
    timeout = communication_timeout(config.health.hang_seconds)
    with StopRequests() as requests, rank_grid(config.parallel, ranks, timeout=timeout) as grid, ExitStack() as stack:
        # Rank 0 locks the run folder and decides what to start from.
        start: RunStart | None = None

        def start_run() -> None:
            nonlocal start
            environment = describe_environment(config, ranks, _device_name(grid), implementations(config, grid.device))
            start = _start_run(config, run_dir, init_from, environment, stack)

        grid.first_rank_does("run folder", start_run)
        start = grid.all_gather(start, RunStart | None)[0]
        assert start is not None, "rank 0 has started the run"
        source, folder = start.source, start.folder
        config = replace(config, optimizer=start.optimizer)

        # Reporting.
        report = stack.enter_context(Report(config, grid, folder, source))
        if grid.is_first_rank and (problem := copy_tokenizer(folder, config.data.train)) is not None:
            report.say(problem)
        attempt = Attempt(folder, report.say)
        attempt.step = source.step
        if grid.is_first_rank:
            stack.enter_context(attempt)

        # Health checks.
        if config.health.preflight:
            preflight(config, ranks, grid, folder.path, report.say)
        watchdog = stack.enter_context(Watchdog(config.health.hang_seconds, ranks, grid, folder, attempt.hung))

        # Model, optimizer and checkpoints.
        training = Training(config, grid)
        spikes = SpikeDetector(config.train) if config.train.spike != "off" else None
        ledger = stack.enter_context(SpikeLedger(grid, folder, report.say))
        checkpoints = stack.enter_context(
            Checkpoints(
                config,
                grid,
                training,
                folder.checkpoints,
                host=ranks.host(),
                attempt=folder.attempt,
                lock=start.lock,
                report=report.saved,
                spikes=spikes,
            )
        )
        with recording_failure(folder.path, source):
            position = checkpoints.load(source)

        stragglers = Stragglers(grid, folder.stragglers)
        log = config.log
        profiler = StepProfiler(folder.path / FOLDER, log.profile_steps, log.profile_ranks, ranks.rank, grid.device)
        collect = stack.enter_context(collected_at_steps())
        loop = _Loop(
            config, grid, training, checkpoints, report, requests, spikes, ledger, watchdog, stragglers, attempt,
            profiler, collect,
        )  # fmt: skip
        with watching_workers(config.data.workers):
            attempt.is_stopped = loop.run(position)
        return attempt.is_stopped


@dataclass(frozen=True)
class RunStart:
    """What rank 0 decides when a run starts, and sends to all ranks."""

    folder: RunFolder
    source: Source
    lock: tuple[Path, str]  # path and token of the lock file
    optimizer: OptimizerConfig  # with the schedule of the resumed run, which other ranks have not read


def _start_run(
    config: Config, run_dir: Path, init_from: InitFrom | None, environment: Mapping[str, Any], stack: ExitStack
) -> RunStart:
    """Lock the run folder until `stack` closes, find what to start from, and create the files of a new attempt."""
    try:  # this was checked before the ranks started, but another run may have come since
        lock = stack.enter_context(RunLock.acquire(run_dir))
        source = find_source(run_dir, init_from)
        if source.config is not None:
            refuse_other_model(config.model, source.config["model"], str(source.path))
        folder = RunFolder.create(run_dir, config, environment)
    except ValueError as error:
        raise RunError(str(error)) from error
    clean(folder.checkpoints)
    record_skipped(folder.path, folder.checkpoints, source)
    return RunStart(folder, source, (lock.path, lock.token), config.optimizer)


@dataclass(frozen=True)
class _Loop:
    """The steps of a run, and what happens between them."""

    config: Config
    grid: Grid
    training: Training
    checkpoints: Checkpoints
    report: Report
    requests: StopRequests
    spikes: SpikeDetector | None
    ledger: SpikeLedger
    watchdog: Watchdog
    stragglers: Stragglers
    attempt: Attempt
    profiler: StepProfiler
    collect_garbage: Callable[[int], None]

    def run(self, position: Position) -> bool:
        """Train from `position` to the last step. Returns True if the run was stopped on request before it."""
        config, checkpoints, report = self.config, self.checkpoints, self.report
        last_step, global_batch = config.train.steps, config.train.global_batch
        if position.step >= last_step:
            report.say(f"Nothing is left to do: step {position.step} of {last_step} is saved.")
            return False
        total_samples = position.samples + (last_step - position.step) * global_batch
        train_samples, eval_samples = _open_data(config, self.grid, total_samples)
        evaluations = [self._held_out_loss(name, samples) for name, samples in eval_samples.items()]
        batches = self._train_batches(train_samples, position)
        report.begin(train_samples, total_samples)
        self._evaluate(evaluations, position.step)

        while position.step < last_step:
            result = self._step(batches, position.step + 1)
            position = Position(position.step + 1, position.samples + global_batch)

            rewound_to = self._handle_spike(result.spike, position) if result.spike is not None else None
            if rewound_to is not None:  # a pending request to stop is seen by the next step
                position = Position(rewound_to, position.samples)  # the step goes back, the data does not
                self.attempt.step = rewound_to
                batches = self._train_batches(train_samples, position)
                continue

            self.attempt.step = position.step
            self._log(position, result)
            self.collect_garbage(position.step)
            checkpoints.poll()
            if result.stop and position.step < last_step:
                self._save_and_stop(position)
                return True
            if checkpoints.is_due(position.step):
                report.checkpoint(position, checkpoints.save(position))
            self._evaluate(evaluations, position.step)

        checkpoints.finish(position)
        report.end()
        return False

    def _step(self, batches: Iterator[Batch], step: int) -> StepResult:
        with self.watchdog.watching("step", step), self.profiler.of(step):
            return self.training.step(
                batches,
                stop=self.requests.requested is not None or self.checkpoints.is_taken_over,
                detect_spike=self.spikes.detect if self.spikes is not None else None,
                measure=self.report.is_logged(step),
                health=self.report.is_health_logged(step),
            )

    def _log(self, position: Position, result: StepResult) -> None:
        self.report.step(position, result, self.spikes)
        if result.work is not None and self.grid.is_first_rank:
            warning = self.stragglers.record(position.step, result.work)
            if warning is not None:
                self.report.say(warning)

    def _evaluate(self, evaluations: list[Evaluation], step: int) -> None:
        """Run the evaluations that are due after `step`."""
        for evaluation in evaluations:
            if evaluation.is_due(step, self.config.train.steps):
                phase = " ".join(filter(None, ("evaluation", evaluation.name, "at step")))
                with self.watchdog.watching(phase, step):
                    figures = evaluation.run(self.training)
                self.report.evaluation(step, figures)

    def _save_and_stop(self, position: Position) -> None:
        reason = "another run has taken over the run folder" if self.checkpoints.is_taken_over else "asked to stop"
        self.report.say(f"step {position.step}: {reason}; saving")
        self.checkpoints.finish(position)
        self.report.end()
        self.report.say("Stopped on request. Start it again with this run folder to resume.")

    def _handle_spike(self, spike: Spike, position: Position) -> int | None:
        """Skip or rewind after a spike, as `train.spike` says; `position` is after it. Returns the step rewound to.

        Raises SpikeError if there are more spikes than `train.spike_limit` allows.
        """
        spikes, limit, window = self.spikes, self.config.train.spike_limit, self.config.train.spike_window
        assert spikes is not None, "the detector has found the spike"
        samples = [position.samples - self.config.train.global_batch, position.samples]
        fields: dict[str, Any] = {"step": position.step, "samples": samples}
        if spikes.is_too_many(position.step):
            self.ledger.write(spike, action="end", **fields)
            raise SpikeError(
                f"step {position.step}: {spike.text}. No weight was changed. The run ends: there were more than "
                f"train.spike_limit = {limit} spikes within train.spike_window = {window} steps"
            )
        rewound = self.checkpoints.rewind() if self.config.train.spike == REWIND else None
        if rewound is None:
            spikes.skipped += 1
            action, text = SKIP, "update skipped"
            if self.config.train.spike == REWIND:
                text += ", as there is no checkpoint to rewind to yet"
        else:
            spikes.rewinds += 1
            fields |= {"back_to": rewound.step}
            action, text = REWIND, f"rewound to step {rewound.step}; training continues with the data after this batch"
            if rewound.set_aside is not None:
                text += f". The later checkpoint leads to a spike again; it is kept as {rewound.set_aside.name}"
        self.ledger.write(spike, action=action, **fields)
        step = rewound.step if rewound is not None else None
        self.report.spike(position.step, f"SPIKE: {spike.text}; {text}", spikes, step)
        return step

    def _train_batches(self, samples: Samples, position: Position) -> Iterator[Batch]:
        return _batches(self.config, self.grid, samples, position.samples, workers=self.config.data.workers)

    def _held_out_loss(self, name: str, samples: Samples) -> Evaluation:
        def batches() -> Iterator[Batch]:
            return self.watchdog.progress(_batches(self.config, self.grid, samples, 0, workers=0))

        return held_out_loss(name, self.config.train, batches, samples.bytes_per_token)


def implementations(config: Config, device: torch.device) -> dict[str, str]:
    """The implementation in use of each part that has several. ValueError if the configured one cannot run here."""
    dtype = getattr(torch, config.train.dtype)
    check_graphs(config.train.cuda_graphs, device)
    return {
        "optimizer": optimizer_name(),
        "attention": local_attention.resolve_backend(
            attention_backend(config.train), device, dtype, config.model.head_dim, "train.attention"
        ),
        "kernels": resolve_backend(config.train.kernels, device, dtype, "train.kernels"),
    }


def _open_data(config: Config, grid: Grid, total_samples: int) -> tuple[Samples, dict[str, Samples]]:
    """The training samples and those of each held-out set, by name. Builds the index of what the run reads first.

    `total_samples` is the number of training samples that the run will have read at its end.
    """
    eval_samples = config.train.eval_batches * config.train.global_batch
    blends = [(config.data.train, total_samples), *((blend, eval_samples) for blend in config.data.eval_sets.values())]
    settings: dict[str, Any] = {
        "sequence_length": config.data.sequence_length,
        "seed": config.train.seed,
        "cache": config.data.cache or None,
    }

    def build() -> None:
        for entries, samples in blends:
            build_index(entries, samples=samples, **settings)

    grid.first_rank_does("data index", build)
    train, *held_out = (open_samples(entries, **settings) for entries, _ in blends)
    return train, dict(zip(config.data.eval_sets, held_out, strict=True))


def _batches(config: Config, grid: Grid, samples: Samples, first_sample: int, *, workers: int) -> Iterator[Batch]:
    return batches(
        samples,
        first_sample=first_sample,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        data_rank=grid.data_rank,
        data_size=grid.data_size,
        workers=workers,
    )


def _device_name(grid: Grid) -> str:
    return torch.cuda.get_device_name(grid.device) if grid.device.type == "cuda" else "cpu"

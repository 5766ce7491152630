"""The training loop as every rank runs it: data -> step -> log -> evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from griffin.trainer.checkpoint.unreadable import note_skipped, noting
from griffin.trainer.data.dataset import Samples, build_index, open_samples
from griffin.trainer.data.loader import batches, watching_workers
from griffin.trainer.evaluation import Evaluation, held_out_loss
from griffin.trainer.health.spikes import REWIND, SKIP, Ledger, Spike, SpikeDetector, SpikeError
from griffin.trainer.health.stragglers import Stragglers
from griffin.trainer.health.watchdog import Watchdog, communication_timeout
from griffin.trainer.optimizer import optimizer_name
from griffin.trainer.preflight.check import preflight
from griffin.trainer.reporting.report import Report
from griffin.trainer.run.attempts import Attempt
from griffin.trainer.run.folder import RunFolder, describe_environment
from griffin.trainer.run.lock import RunLock
from griffin.trainer.run.signals import StopRequests
from griffin.trainer.run.tokenizer_copy import keep_tokenizer
from griffin.trainer.settings.sections import Config, OptimizerConfig
from griffin.trainer.step import Batch, Training


def train(config: Config, ranks: Ranks, run_dir: Path, init_from: InitFrom | None = None) -> bool:
    """Train a validated config on all ranks; rank 0 writes `run_dir`. True where it was asked to stop before the end.

    Goes on from the newest checkpoint of `run_dir`, else begins with `init_from`, else anew (see `find_source`). On
    SIGTERM or SIGUSR1 to any rank, all stop after the same step, which is saved.

    Raises PreflightError (see `trainer.preflight.check`) where a rank's machine or links are not fit, NonFiniteError
    where the loss or a gradient is NaN or infinite and `train.spike` is off, SpikeError where there are too many
    spikes, WorkerError where a process that draws batches has ended, ReplicaError where copies of a
    weight differ, CheckpointError where what it starts from is damaged, and SaveError where the last state could not
    be saved. Where it hangs, the process ends with HUNG (see `trainer.health.watchdog`).
    """
    timeout = communication_timeout(config.health.hang_seconds)
    with StopRequests() as requests, rank_grid(config.parallel, ranks, timeout=timeout) as grid, ExitStack() as stack:
        opened: Opened | None = None

        def open_folder() -> None:
            nonlocal opened
            environment = describe_environment(config, ranks, _device_name(grid), implementations(config, grid.device))
            opened = _open_folder(config, run_dir, init_from, environment, stack)

        grid.first_rank_does("run folder", open_folder)
        opened = grid.all_gather(opened, Opened | None)[0]
        assert opened is not None, "rank 0 has opened the folder"
        source, folder = opened.source, opened.folder
        config = replace(config, optimizer=opened.optimizer)
        report = stack.enter_context(Report(config, grid, folder, source))
        if grid.is_first_rank and (problem := keep_tokenizer(folder, config.data.train)) is not None:
            report.say(problem)
        attempt = Attempt(folder, report.say)
        attempt.step = source.step
        if grid.is_first_rank:
            stack.enter_context(attempt)
        if config.health.preflight:
            preflight(config, ranks, grid, folder.path, report.say)
        watchdog = stack.enter_context(Watchdog(config.health.hang_seconds, ranks, grid, folder, attempt.hung))
        training = Training(config, grid)
        spikes = SpikeDetector(config.train) if config.train.spike != "off" else None
        ledger = stack.enter_context(Ledger(grid, folder, report.say))
        checkpoints = stack.enter_context(
            Checkpoints(
                config,
                grid,
                training,
                folder.checkpoints,
                host=ranks.host(),
                attempt=folder.attempt,
                lock=opened.lock,
                report=report.saved,
                spikes=spikes,
            )
        )
        with noting(folder.path, source):
            position = checkpoints.load(source)
        stragglers = Stragglers(grid, folder.stragglers)
        run = _Run(config, grid, training, checkpoints, report, requests, spikes, ledger, watchdog, stragglers, attempt)
        with watching_workers(config.data.workers):
            attempt.is_stopped = run.go_on_from(position)
        return attempt.is_stopped


@dataclass(frozen=True)
class Opened:
    """What rank 0 finds out and does for all when a run starts."""

    folder: RunFolder
    source: Source
    lock: tuple[Path, str]  # file and token
    optimizer: OptimizerConfig  # with the schedule that goes on, of which other ranks do not know


def _open_folder(
    config: Config, run_dir: Path, init_from: InitFrom | None, environment: Mapping[str, Any], stack: ExitStack
) -> Opened:
    """Lock the run folder until `stack` ends, find what to start from, and begin an attempt in it."""
    try:  # checked before ranks started, but not held since
        lock = stack.enter_context(RunLock.acquire(run_dir))
        source = find_source(run_dir, init_from)
        if source.config is not None:
            refuse_other_model(config.model, source.config["model"], str(source.path))
        folder = RunFolder.create(run_dir, config, environment)
    except ValueError as error:
        raise RunError(str(error)) from error
    clean(folder.checkpoints)
    note_skipped(folder.path, folder.checkpoints, source)
    return Opened(folder, source, (lock.path, lock.token), config.optimizer)


@dataclass(frozen=True)
class _Run:
    """The steps of a training."""

    config: Config
    grid: Grid
    training: Training
    checkpoints: Checkpoints
    report: Report
    requests: StopRequests
    spikes: SpikeDetector | None
    ledger: Ledger
    watchdog: Watchdog
    stragglers: Stragglers
    attempt: Attempt

    def go_on_from(self, position: Position) -> bool:
        """The steps after `position`, to the end or to a request to stop; True for the latter."""
        config, training, checkpoints, report = self.config, self.training, self.checkpoints, self.report
        if position.step >= config.train.steps:
            report.say(f"Nothing is left to do: step {position.step} of {config.train.steps} is saved.")
            return False
        drawn = position.samples + (config.train.steps - position.step) * config.train.global_batch
        train_samples, eval_samples = _open_data(config, self.grid, drawn)
        evaluations = [self._held_out_loss(name, samples) for name, samples in eval_samples.items()]
        train_batches = _batches(config, self.grid, train_samples, position.samples, workers=config.data.workers)
        report.begin(train_samples, drawn)
        rewound: int | None = None  # the step gone back to, with weights that were evaluated before
        while True:
            for evaluation in evaluations:
                if evaluation.is_due(position.step, config.train.steps) and position.step != rewound:
                    kind = " ".join(filter(None, ("evaluation", evaluation.name, "at step")))
                    with self.watchdog.watching(kind, position.step):
                        figures = evaluation.run(training)
                    report.evaluation(position.step, figures)
            if position.step == config.train.steps:
                break
            stop = self.requests.requested is not None or checkpoints.is_taken_over
            judge = self.spikes.judge if self.spikes is not None else None
            step = position.step + 1
            with self.watchdog.watching("step", step):
                result = training.step(
                    train_batches,
                    stop=stop,
                    judge=judge,
                    measure=report.is_logged(step),
                    health=report.looks_at_health(step),
                )
            position = Position(step, position.samples + config.train.global_batch)
            rewound = self._answer(result.spike, position) if result.spike is not None else None
            if rewound is not None:  # a request to stop is heard by the next step
                position = Position(rewound, position.samples)
                self.attempt.step = rewound
                train_batches = _batches(
                    config, self.grid, train_samples, position.samples, workers=config.data.workers
                )
                continue
            self.attempt.step = step
            report.step(position, result, self.spikes)
            if result.work is not None and self.grid.is_first_rank:
                line = self.stragglers.note(step, result.work)
                if line is not None:
                    report.say(line)
            checkpoints.poll()
            if result.stop and position.step < config.train.steps:
                why = "another run has taken the run folder over" if checkpoints.is_taken_over else "asked to stop"
                report.say(f"step {position.step}: {why}; saving")
                checkpoints.finish(position)
                report.end()
                report.say("Stopped on request: started again with this run folder, the training goes on.")
                return True
            if checkpoints.is_due(position.step):
                report.checkpoint(position, checkpoints.save(position))
        checkpoints.finish(position)
        report.end()
        return False

    def _held_out_loss(self, name: str, samples: Samples) -> Evaluation:
        def draw() -> Iterator[Batch]:
            return self.watchdog.progress(_batches(self.config, self.grid, samples, 0, workers=0))

        return held_out_loss(name, self.config.train, draw, samples.bytes_per_token)

    def _answer(self, spike: Spike, position: Position) -> int | None:
        """Do about a spike what `train.spike` says, with `position` after it: the step gone back to, if any.

        Raises SpikeError where it is one too many.
        """
        spikes, limit, window = self.spikes, self.config.train.spike_limit, self.config.train.spike_window
        assert spikes is not None, "they have found it"
        samples = [position.samples - self.config.train.global_batch, position.samples]
        fields: dict[str, Any] = {"step": position.step, "samples": samples}
        if spikes.is_too_many(position.step):
            self.ledger.write(spike, action="end", **fields)
            raise SpikeError(
                f"step {position.step}: {spike.text}. No weight was changed. More than train.spike_limit = {limit} "
                f"spikes within train.spike_window = {window} steps: the run ends"
            )
        back = self.checkpoints.rewind() if self.config.train.spike == REWIND else None
        if back is None:
            spikes.skipped += 1
            action, text = SKIP, "no update"
            if self.config.train.spike == REWIND:
                text += ", as there is no checkpoint to go back to yet"
        else:
            spikes.rewinds += 1
            fields |= {"back_to": back.step}
            action, text = REWIND, f"back to step {back.step}, and on with the data after this batch"
            if back.set_aside is not None:
                text += f". From the checkpoint after that it comes no further: it is kept as {back.set_aside.name}"
        self.ledger.write(spike, action=action, **fields)
        step = back.step if back is not None else None
        self.report.spike(position.step, f"SPIKE: {spike.text}; {text}", spikes, step)
        return step


def implementations(config: Config, device: torch.device) -> dict[str, str]:
    """What computes the parts that have more than one implementation. ValueError for one that cannot run here."""
    dtype = getattr(torch, config.train.dtype)
    return {
        "optimizer": optimizer_name(),
        "attention": local_attention.select_backend(device),
        "kernels": resolve_backend(config.train.kernels, device, dtype, "train.kernels"),
    }


def _open_data(config: Config, grid: Grid, drawn: int) -> tuple[Samples, dict[str, Samples]]:
    """Samples for training, of which `drawn` will have been drawn at the end, and those of each held-out set."""
    evaluated = config.train.eval_batches * config.train.global_batch
    blends = [(config.data.train, drawn), *((blend, evaluated) for blend in config.data.eval_sets.values())]
    settings: dict[str, Any] = {
        "sequence_length": config.data.sequence_length,
        "seed": config.train.seed,
        "cache": config.data.cache or None,
    }

    def build() -> None:
        for entries, samples in blends:
            build_index(entries, samples=samples, **settings)

    grid.first_rank_does("data index", build)
    train_samples, *eval_samples = (open_samples(entries, **settings) for entries, _ in blends)
    return train_samples, dict(zip(config.data.eval_sets, eval_samples, strict=True))


def _batches(config: Config, grid: Grid, samples: Samples, first: int, *, workers: int) -> Iterator[Batch]:
    return batches(
        samples,
        first_sample=first,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        data_rank=grid.data_rank,
        data_size=grid.data_size,
        workers=workers,
    )


def _device_name(grid: Grid) -> str:
    return torch.cuda.get_device_name(grid.device) if grid.device.type == "cuda" else "cpu"

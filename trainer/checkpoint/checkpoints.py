"""Load and save a training: resume from a checkpoint, save in the background, rewind after a spike."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from griffin.parallel.world.grid import Grid
from griffin.parallel.world.ranks import RunError
from griffin.trainer.checkpoint.header import Header
from griffin.trainer.checkpoint.manifest import CheckpointError, read_manifest, set_aside
from griffin.trainer.checkpoint.saving.saver import Outcome, Saver
from griffin.trainer.checkpoint.source import Source
from griffin.trainer.checkpoint.state import ShardedState
from griffin.trainer.checkpoint.steps import newest_complete
from griffin.trainer.health.non_finite import NonFiniteError
from griffin.trainer.health.spikes import SpikeDetector, SpikeError
from griffin.trainer.optimizer import optimizer_name
from griffin.trainer.run.lock import is_taken_over
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training


class SaveError(RunError):
    """The last state of a training could not be saved. Earlier checkpoints are intact."""


@dataclasses.dataclass(frozen=True)
class Position:
    """The progress of a training."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # training samples drawn


@dataclasses.dataclass(frozen=True)
class Rewound:
    """The checkpoint that a training has gone back to."""

    step: int
    set_aside: Path | None  # where a newer checkpoint is kept that turned out to be bad


class Stateful(Protocol):
    """An object whose state checkpoints save in the header's `extras`."""

    def state(self) -> Any:
        """The state as a JSON value, equal on every rank."""
        ...

    def restore(self, state: Any, *, values_only: bool = False) -> None:
        """Restore what `state` returned. With `values_only` (in a rewind), keep counts of events since then."""
        ...


class Checkpoints:
    """Loads a training, and saves it while it continues. All ranks make the same calls. A context manager.

    `host` is this machine's address for other ranks' saving processes. `lock` is (path, token) of the run folder's
    lock, which rank 0 checks. `report` is called on every rank with the outcome of each save. `spikes` judges the
    training's steps, unless it is off; its state is saved and restored. So is that of `extras`, by name. State that a
    checkpoint has under other names is carried along to later checkpoints.
    """

    def __init__(
        self,
        config: Config,
        grid: Grid,
        training: Training,
        root: Path,
        *,
        host: str,
        attempt: int,
        lock: tuple[Path, str] | None,
        report: Callable[[Outcome], None],
        spikes: SpikeDetector | None = None,
        extras: Mapping[str, Stateful] | None = None,
    ):
        self._config, self._grid, self._attempt, self._report = config, grid, attempt, report
        self._spikes = spikes
        self._extras: Mapping[str, Stateful] = extras or {}
        self._carried_extras: dict[str, Any] = {}  # of the checkpoint that was loaded
        self._lock = lock if grid.is_first_rank else None
        self.is_taken_over = False  # whether another run writes the folder now; set on rank 0
        self._root, self._training = root, training
        self._state = ShardedState(training, grid)
        self._saver = Saver(
            root=root,
            plan=self._state.save_plan(),
            all_gather=grid.all_gather,
            rank=grid.rank,
            world_size=grid.world_size,
            host=host,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            lock=lock,
        )
        self._staging = torch.from_numpy(self._saver.staging)
        if grid.device.type == "cuda" and self._staging.numel() > 0:
            # Page-lock it: the GPU then copies to it at full bus speed, without a bounce buffer.
            size = self._staging.numel() * self._staging.element_size()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._staging.data_ptr(), size, 0))
        self._last_started: int | None = None  # step of the last save that was started
        self._last_outcome: Outcome | None = None  # of the last save that has ended, as known to this rank
        self._rewound: tuple[Path, int] | None = None  # of the last rewind: the checkpoint, and the steps done before

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NonFiniteError | SpikeError):
            # Raised on every rank: wait for the save in progress, which is from before the failure.
            self._report_outcome(self._saver.wait())
        if self._grid.device.type == "cuda" and self._staging.numel() > 0:
            torch.cuda.cudart().cudaHostUnregister(self._staging.data_ptr())
        self._saver.close()

    def load(self, source: Source) -> Position:
        """Load `source`, and return the position to resume from. Raises as `ShardedState.load`."""
        if source.path is None:
            return Position()
        manifest = read_manifest(source.path)
        self._state.load(source.path, manifest, everything=source.everything)
        if not source.everything:
            return Position()
        self._restore(manifest)
        return Position(manifest.step, manifest.samples)

    def rewind(self) -> Rewound | None:
        """Load the last good checkpoint of this run; None if there is none yet. A collective.

        This is the newest checkpoint, unless the last rewind led to it too and the training got no further with other
        data. The fault is then in that checkpoint: it is set aside, and the one before it is loaded, if there is one.

        Raises as `ShardedState.load`.
        """
        self._report_outcome(self._saver.wait())
        found = self._last_good() if self._grid.is_first_rank else (None, None)
        path, aside = self._grid.all_gather(found, tuple[Path | None, Path | None])[0]
        if path is None:
            return None
        self._rewound = path, self._training.steps_done
        manifest = read_manifest(path)
        self._state.load(path, manifest, everything=True)
        self._restore(manifest, values_only=True)
        self._last_started = None  # later steps are computed and saved again
        return Rewound(manifest.step, aside)

    def _last_good(self) -> tuple[Path | None, Path | None]:
        """The checkpoint to go back to, and where a newer one was set aside. On rank 0 only."""
        here = self._training.steps_done
        newest, _ = newest_complete(self._root, before=here)
        if newest is None or self._rewound is None or self._rewound[0] != newest or here > self._rewound[1]:
            return newest, None
        older, _ = newest_complete(self._root, before=read_manifest(newest).step)
        if older is None or (self._lock is not None and is_taken_over(*self._lock)):
            return newest, None
        try:
            return older, set_aside(newest, "spiked")
        except CheckpointError:  # if it cannot be renamed, a restart would resume from it: stay with it
            return newest, None

    def is_due(self, step: int) -> bool:
        """Whether to save after `step`: every `checkpoint.interval` steps, and at the end of the training."""
        interval = self._config.checkpoint.interval
        return step == self._config.train.steps or (interval > 0 and step % interval == 0)

    def save(self, position: Position) -> float:
        """Start to save the current state in the background. Returns the seconds for which the training stalled.

        The stall is a copy in memory, and the wait for the previous save if it is still in progress. A failed save is
        reported, and does not affect the next one.
        """
        started = time.perf_counter()
        self._report_outcome(self._saver.wait())
        self._state.stage(self._staging)
        self._saver.start(position.step, self._header(position) if self._grid.is_first_rank else None)
        self._last_started = position.step
        return time.perf_counter() - started

    def poll(self) -> None:
        """Report the outcome of the save in progress, if it has ended."""
        self._report_outcome(self._saver.poll())

    def finish(self, position: Position) -> None:
        """Save the current state, unless it is saved, and wait for it. Raises SaveError after a second failure."""
        error: str | None = None
        for tries in range(2):
            if self._last_started != position.step or tries > 0:
                self.save(position)
            self._report_outcome(self._saver.wait())
            # Rank 0's saving process commits the checkpoint, and so knows the outcome for certain.
            ended = self._grid.all_gather(self._last_outcome, Outcome | None)[0]
            assert ended is not None, "a save was started"
            if ended.error is None:
                return
            error = ended.error
        raise SaveError(f"step {position.step} could not be saved: {error}")

    def _report_outcome(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._last_outcome = outcome
            self._report(outcome)
            if outcome.error is not None and self._lock is not None:
                self.is_taken_over = is_taken_over(*self._lock)

    def _restore(self, header: Header, *, values_only: bool = False) -> None:
        """Restore all state besides tensors; `values_only` as in `Stateful.restore`."""
        _set_random_state(header.random, self._grid.device)
        if self._spikes is not None and header.spikes is not None:
            self._spikes.restore(header.spikes, values_only=values_only)
        for name, stateful in self._extras.items():
            if name in header.extras:
                stateful.restore(header.extras[name], values_only=values_only)
        self._carried_extras = header.extras

    def _header(self, position: Position) -> Header:
        return Header(
            step=position.step,
            samples=position.samples,
            attempt=self._attempt,
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            config=json.loads(json.dumps(dataclasses.asdict(self._config))),
            layout=self._config.parallel.record(self._grid.world_size),
            optimizer={"name": optimizer_name(), "step": self._training.optimizer.updates_done},
            random=_random_state(self._grid.device),
            spikes=self._spikes.state() if self._spikes is not None else None,
            extras=self._carried_extras | {name: stateful.state() for name, stateful in self._extras.items()},
        )


def _random_state(device: torch.device) -> dict[str, str]:
    """States of PyTorch's default generators. All other random streams of a run are derived from the seed."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _set_random_state(states: dict[str, str], device: torch.device) -> None:
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)

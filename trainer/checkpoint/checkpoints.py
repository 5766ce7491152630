"""The checkpoints of a run: what it starts from, and saving it while it goes on."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from griffin.parallel.world.grid import Grid
from griffin.parallel.world.ranks import RunError
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
    """The last state of a training could not be saved. Earlier checkpoints stand."""


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a training has come."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # training samples that they took


@dataclasses.dataclass(frozen=True)
class Rewound:
    """Where a training has gone back to."""

    step: int
    set_aside: Path | None  # what has become of a newer checkpoint that was not good


class Checkpoints:
    """Loads a training, and saves it while it goes on. Made and called by all ranks alike; a context manager.

    `host` is this machine's address for other ranks' saving processes. `lock` is (path, token) of the run folder's
    lock, of which rank 0's knows. `report` is told on every rank what became of each save. `spikes` is what judges the
    training's steps, if anything does: its state is a part of the training's.
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
    ):
        self._config, self._grid, self._attempt, self._report = config, grid, attempt, report
        self._spikes = spikes
        self._lock = lock if grid.is_first_rank else None
        self.is_taken_over = False  # another run writes the folder by now; rank 0 finds out
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
            # Page-locked: a GPU copies to it at the bus's speed, not through a bounce buffer.
            size = self._staging.numel() * self._staging.element_size()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._staging.data_ptr(), size, 0))
        self._begun: int | None = None  # step of the last save that was begun
        self._ended: Outcome | None = None  # of the last save that has ended, as this rank knows
        self._rewound: tuple[Path, int] | None = None  # checkpoint last gone back to, and the step that was left

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NonFiniteError | SpikeError):
            # On every rank alike: what was saved before it went wrong is worth a wait.
            self._tell(self._saver.wait())
        if self._grid.device.type == "cuda" and self._staging.numel() > 0:
            torch.cuda.cudart().cudaHostUnregister(self._staging.data_ptr())
        self._saver.close()

    def load(self, source: Source) -> Position:
        """Fill in what `source` says, and tell where to go on. Raises as `ShardedState.load`."""
        if source.path is None:
            return Position()
        manifest = read_manifest(source.path)
        self._state.load(source.path, manifest, everything=source.everything)
        if not source.everything:
            return Position()
        _set_random_state(manifest.random, self._grid.device)
        if self._spikes is not None and manifest.spikes is not None:
            self._spikes.restore(manifest.spikes)
        return Position(manifest.step, manifest.samples)

    def rewind(self) -> Rewound | None:
        """Go back to the last good checkpoint of this run; None where there is none yet. A collective.

        That is the newest one, unless the training was there before and comes no further with other data: then what is
        wrong is in it, it is set aside, and the one before it is taken, if there is any.

        Raises as `ShardedState.load`.
        """
        self._tell(self._saver.wait())
        found = self._last_good() if self._grid.is_first_rank else (None, None)
        path, aside = self._grid.all_gather(found, tuple[Path | None, Path | None])[0]
        if path is None:
            return None
        self._rewound = path, self._training.steps_done
        manifest = read_manifest(path)
        self._state.load(path, manifest, everything=True)
        _set_random_state(manifest.random, self._grid.device)
        assert self._spikes is not None, "a spike was found"
        if manifest.spikes is not None:
            self._spikes.restore(manifest.spikes, values_only=True)
        self._begun = None  # later steps are made, and saved, anew
        return Rewound(manifest.step, aside)

    def _last_good(self) -> tuple[Path | None, Path | None]:
        """The checkpoint to go back to, and where a newer one is kept that was set aside. For rank 0."""
        here = self._training.steps_done
        newest, _ = newest_complete(self._root, before=here)
        if newest is None or self._rewound is None or self._rewound[0] != newest or here > self._rewound[1]:
            return newest, None
        older, _ = newest_complete(self._root, before=read_manifest(newest).step)
        if older is None or (self._lock is not None and is_taken_over(*self._lock)):
            return newest, None
        try:
            return older, set_aside(newest, "spiked")
        except CheckpointError:  # it cannot be renamed, and would be the one that the run is continued from
            return newest, None

    def is_due(self, step: int) -> bool:
        """Every `checkpoint.interval` steps, and at the end of the training."""
        interval = self._config.checkpoint.interval
        return step == self._config.train.steps or (interval > 0 and step % interval == 0)

    def save(self, position: Position) -> float:
        """Begin to save the training as it is now. Returns the seconds that it took from the training.

        They are those of a copy in memory, unless the save before has not ended, which is waited for. Where one fails,
        it is reported, and the next is tried as if nothing had been.
        """
        begun = time.perf_counter()
        self._tell(self._saver.wait())
        self._state.stage(self._staging)
        self._saver.start(position.step, self._header(position) if self._grid.is_first_rank else None)
        self._begun = position.step
        return time.perf_counter() - begun

    def poll(self) -> None:
        """Report what became of the save under way, if it has ended."""
        self._tell(self._saver.poll())

    def finish(self, position: Position) -> None:
        """Have the training as it is now saved when this returns. Tries twice; raises SaveError after that."""
        error: str | None = None
        for tries in range(2):
            if self._begun != position.step or tries > 0:
                self.save(position)
            self._tell(self._saver.wait())
            # Rank 0's saving process is the one that knows whether the checkpoint stands.
            ended = self._grid.all_gather(self._ended, Outcome | None)[0]
            assert ended is not None, "a save has been begun"
            if ended.error is None:
                return
            error = ended.error
        raise SaveError(f"step {position.step} could not be saved: {error}")

    def _tell(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._ended = outcome
            self._report(outcome)
            if outcome.error is not None and self._lock is not None:
                self.is_taken_over = is_taken_over(*self._lock)

    def _header(self, position: Position) -> dict[str, Any]:
        """The manifest's fields, but for the arrays and files."""
        return {
            "step": position.step,
            "samples": position.samples,
            "attempt": self._attempt,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config": json.loads(json.dumps(dataclasses.asdict(self._config))),
            "layout": self._config.parallel.record(self._grid.world_size),
            "optimizer": {"name": optimizer_name(), "step": self._training.optimizer.updates_done},
            "random": _random_state(self._grid.device),
            "spikes": self._spikes.state() if self._spikes is not None else None,
        }


def _random_state(device: torch.device) -> dict[str, str]:
    """PyTorch's default generators, the only random streams of a run besides those made anew from the seed."""
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

"""Messages between a rank and its saving process."""

from __future__ import annotations

from dataclasses import dataclass

from griffin.trainer.checkpoint.header import Header
from griffin.trainer.checkpoint.plan import SavePlan
from griffin.trainer.checkpoint.saving.coordinator import Target

ROWS = 3  # of the staged state: master weights, exp_avg, exp_avg_sq


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a saving process is started with."""

    rank: int
    parent: int  # process id of the rank
    world_size: int
    host: str
    key: bytes  # known to this run's processes only
    plan: SavePlan
    target: Target
    timeout: float  # seconds to wait for another process or the file system


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """Rank to process: save the staged state."""

    save: int  # number of the save, equal on all ranks
    step: int
    addresses: tuple[tuple[str, int], ...]  # of every rank's saving process
    header: Header | None  # on rank 0


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Process to rank, first of all: it can save."""

    port: int  # at which other ranks' saving processes connect; 0 for a single rank


@dataclass(frozen=True, kw_only=True)
class FolderCreated:
    """Process to rank: the step's folder was created. Its inode identifies it after the rename that commits it."""

    inode: int


@dataclass(frozen=True)
class Heartbeat:
    """Process to rank, at intervals during a save."""


@dataclass(frozen=True, kw_only=True)
class SaveFinished:
    """Process to rank: a save has ended, and the staged state is no longer read."""

    path: str | None
    bytes: int
    error: str | None
    warning: str | None
    seconds: float
    is_stuck: bool  # a thread is blocked in a system call: this process cannot save again

"""What a rank and its saving process tell each other."""

from __future__ import annotations

from dataclasses import dataclass

from griffin.trainer.checkpoint.header import Header
from griffin.trainer.checkpoint.plan import SavePlan
from griffin.trainer.checkpoint.saving.coordinator import Target

ROWS = 3  # of the staged state: master, exp_avg, exp_avg_sq


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a saving process knows from its start."""

    rank: int
    parent: int  # process id of the rank
    world_size: int
    host: str
    key: bytes  # known to this run's processes only
    plan: SavePlan
    target: Target
    timeout: float  # seconds without an answer after which another process, or a file system, is given up


@dataclass(frozen=True, kw_only=True)
class Order:
    """The rank's order to save what is staged."""

    save: int  # number of the save, the same on all ranks
    step: int
    addresses: tuple[tuple[str, int], ...]  # of every rank's saving process
    header: Header | None  # on rank 0


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The first that a saving process says."""

    port: int


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A save's folder is made; its inode stays the same when it is committed."""

    inode: int


@dataclass(frozen=True)
class Alive:
    """Said now and then while a save is under way."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of a save. After it the staged state is not read any longer."""

    path: str | None
    bytes: int
    error: str | None
    warning: str | None
    seconds: float
    is_stuck: bool  # in a call that does not return: this process cannot save again

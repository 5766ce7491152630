"""How the Triton programs of a recurrence cut the work: the selector, and why it chooses what it does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from griffin.kernels.triton_launch import BLOCK

UNROLL = 8  # the most steps of a round; chunks are multiples of it


def loop(program: str, element_size: int) -> tuple[int, int]:
    """Steps of a round, whose loads are issued together and whose gates are computed side by side; rounds in flight.

    Bandwidth asks for 26 KB in flight on each multiprocessor (4.3 TB/s x 800 ns / 132): four forward programs of
    3 rounds x 8 steps x 3 rows x 128 bytes = 9 KB each, of which one round is being worked on. The backward reads and
    keeps more per step: shorter rounds hold its registers and its code down.
    """
    if element_size > 2 or program == "scan_backward":
        return 4, 5
    return UNROLL, 4


CARRIES_BLOCK, CARRIES_CHUNKS, CARRIES_WARPS = 16, 64, 4  # a tile of states at chunk ends that is chained at a time

FULL = 3  # programs for each multiprocessor, which has four schedulers, that the sequential path needs
SPREAD = 8  # that the chunked path aims at: two for each scheduler hide the arithmetic's latency
SHORTEST_CHUNK = 64  # below it the states at chunk ends and the shorter loops cost more than parallelism brings


@dataclass(frozen=True)
class Plan:
    """chunk steps of time per program; one chunk is the sequential path, more cost a second reading of the inputs."""

    steps: int
    chunk: int
    reason: str

    @property
    def chunks(self) -> int:
        return math.ceil(self.steps / self.chunk)


def select_plan(steps: int, batch: int, width: int, multiprocessors: int, chunk: int | None = None) -> Plan:
    """The plan for T steps, B sequences and R channels.

    Sequential where batch and channels alone occupy the device, else time is cut into chunks of a multiple of UNROLL
    steps, as many as occupy it. `chunk` overrides: 0 is sequential, else the steps of a chunk, rounded up to a multiple
    of UNROLL.
    """
    if chunk is not None:
        assert chunk >= 0, chunk
        length = _rounded(chunk) if chunk else steps
        return Plan(steps, min(length, steps), "as asked for")
    rows = batch * math.ceil(width / BLOCK)
    per_device = f"{rows} programs of {BLOCK} channels on {multiprocessors} multiprocessors"
    if rows >= FULL * multiprocessors:
        return Plan(steps, steps, f"sequential: {per_device}, at least {FULL} each")
    chunks = math.ceil(SPREAD * multiprocessors / rows)
    length = max(SHORTEST_CHUNK, _rounded(math.ceil(steps / chunks)))
    if length >= steps:
        return Plan(steps, steps, f"sequential: {steps} steps are no more than a chunk of {length}")
    return Plan(steps, length, f"chunks of {length} steps: {per_device}, below {FULL} each")


def _rounded(steps: int) -> int:
    return math.ceil(steps / UNROLL) * UNROLL

"""Launch plans of the Triton programs of a recurrence: how time is split into chunks, with the reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass

from griffin.kernels.triton_launch import BLOCK

UNROLL = 8  # maximum number of steps unrolled in a round; chunk lengths are multiples of it


def unroll_and_stages(program: str, element_size: int) -> tuple[int, int]:
    """Return the steps unrolled in a round, whose loads are issued together, and the pipeline stages, in rounds.

    Saturating the bandwidth takes 26 KB in flight per multiprocessor (4.3 TB/s x 800 ns / 132): four forward programs
    with 3 rounds x 8 steps x 3 rows x 128 bytes = 9 KB each, besides the round being computed. The backward program
    reads and keeps more per step, so shorter rounds limit its registers and code size.
    """
    if element_size > 2 or program == "scan_backward":
        return 4, 5
    return UNROLL, 4


CARRIES_BLOCK, CARRIES_CHUNKS, CARRIES_WARPS = 16, 64, 4  # tile of chunk states that is chained at a time

MIN_PROGRAMS = 3  # programs per multiprocessor (of four schedulers) from which on the sequential path is used
TARGET_PROGRAMS = 8  # programs per multiprocessor of the chunked path: two per scheduler hide arithmetic latency
MIN_CHUNK = 64  # steps; with shorter chunks, carries and loop overhead cost more than the parallelism gains


@dataclass(frozen=True)
class Plan:
    """Steps of time per program. One chunk is the sequential path; with more, inputs are read twice."""

    steps: int
    chunk: int
    reason: str

    @property
    def chunks(self) -> int:
        return math.ceil(self.steps / self.chunk)


def select_plan(steps: int, batch: int, width: int, multiprocessors: int, chunk: int | None = None) -> Plan:
    """Return the plan for T steps, B sequences and R channels.

    Sequential if batch and channels alone occupy the device. Otherwise time is split into as many chunks as occupy it,
    each a multiple of UNROLL steps. `chunk` overrides this: 0 is sequential, other values are the steps of a chunk,
    rounded up to a multiple of UNROLL.
    """
    if chunk is not None:
        assert chunk >= 0, chunk
        length = _round_up(chunk) if chunk else steps
        return Plan(steps, min(length, steps), "as asked for")
    rows = batch * math.ceil(width / BLOCK)
    per_device = f"{rows} programs of {BLOCK} channels on {multiprocessors} multiprocessors"
    if rows >= MIN_PROGRAMS * multiprocessors:
        return Plan(steps, steps, f"sequential: {per_device}, at least {MIN_PROGRAMS} each")
    chunks = math.ceil(TARGET_PROGRAMS * multiprocessors / rows)
    length = max(MIN_CHUNK, _round_up(math.ceil(steps / chunks)))
    if length >= steps:
        return Plan(steps, steps, f"sequential: {steps} steps are no more than a chunk of {length}")
    return Plan(steps, length, f"chunks of {length} steps: {per_device}, below {MIN_PROGRAMS} each")


def _round_up(steps: int) -> int:
    return math.ceil(steps / UNROLL) * UNROLL

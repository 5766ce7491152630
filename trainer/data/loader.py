"""Batches: the samples that each data-parallel rank takes in each step, prefetched by worker processes."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, default_collate

from griffin.parallel.context import with_offsets
from griffin.parallel.world.ranks import RunError
from griffin.trainer.data.dataset import Samples

# The beginnings of PyTorch's errors if a worker process has died, and if it has raised an error itself.
ENDED, RAISED = "DataLoader worker (pid", "Caught RuntimeError in DataLoader worker process"
NOTICE_SECONDS = 2.0  # for PyTorch to notice the death of a worker process
NO_ROOM = "shared memory"  # part of the error that it raises if shared memory is full

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


class WorkerError(RunError):
    """A data loader process could not be started, has died, or had no shared memory for its batch."""

    def __init__(self, workers: int, said: str) -> None:
        super().__init__(
            f"data.workers = {workers}: a data loader process was killed, or lacked memory or room in "
            f"/dev/shm{_free_memory()}: give the machine or container more, or set fewer data.workers, 0 for none "
            f"({said})"
        )


@contextmanager
def watching_workers(workers: int) -> Iterator[None]:
    """Raise WorkerError if one of `workers` data loader processes dies.

    PyTorch raises its own error wherever this process is at the time, not only while it waits for a batch.
    """
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [""]
        if lines[0].startswith(ENDED):
            raise WorkerError(workers, lines[0].strip()) from error
        if lines[0].startswith(RAISED) and NO_ROOM in lines[-1]:
            raise WorkerError(workers, lines[-1].strip()) from error
        raise


def _free_memory() -> str:
    try:
        return f" ({shutil.disk_usage('/dev/shm').free / 2**20:,.0f} MiB are free)"
    except OSError:
        return ""


def sample_numbers(
    first_sample: int, *, global_batch: int, micro_batch: int, data_rank: int, data_size: int
) -> list[list[int]]:
    """The sample numbers of each micro-batch of data-parallel rank `data_rank` of `data_size` in one step.

    The step takes `global_batch` samples from `first_sample` on, in every layout. Micro-batch m of rank d takes
    `micro_batch` consecutive ones, from first_sample + (m * data_size + d) * micro_batch on.
    """
    first = first_sample + data_rank * micro_batch
    starts = range(first, first_sample + global_batch, data_size * micro_batch)
    return [list(range(start, start + micro_batch)) for start in starts]


def batches(
    samples: Samples,
    *,
    first_sample: int,
    global_batch: int,
    micro_batch: int,
    data_rank: int,
    data_size: int,
    workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches of this rank, in steps that take the samples from `first_sample` on in order.

    There are global_batch / (micro_batch * data_size) micro-batches per step. Each is a dict of the tensors of
    `Samples` with a leading axis, [micro_batch, T], and the offsets of documents (see `context.with_offsets`), in
    pinned memory if there is a CUDA device. `workers` processes, forked from this one, prefetch; 0 loads in this
    process. They ignore signals except SIGTERM from this process.

    Raises ValueError if the batch sizes do not fit, and WorkerError if the processes cannot be started.
    """
    if min(global_batch, micro_batch, data_size) < 1 or global_batch % (micro_batch * data_size):
        raise ValueError(
            f"global_batch {global_batch}: expected a positive multiple of micro_batch {micro_batch} x {data_size} "
            f"data-parallel ranks"
        )
    if first_sample < 0 or not 0 <= data_rank < data_size:
        raise ValueError(f"first_sample {first_sample}, data_rank {data_rank} of {data_size}: out of range")

    def numbers() -> Iterator[list[int]]:
        first = first_sample
        while True:
            yield from sample_numbers(
                first, global_batch=global_batch, micro_batch=micro_batch, data_rank=data_rank, data_size=data_size
            )
            first += global_batch

    loader = DataLoader(
        samples,
        batch_sampler=numbers(),
        collate_fn=_collate,
        num_workers=workers,
        # Explicit: a rank that was started by a fork server would by default start a server of its own, which imports
        # everything again.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_shield_from_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise the loader would advance torch's default generator
    )
    # Block these signals around the fork, so that workers and all their threads start with them blocked.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return _drawn(iter(loader), workers)
    except OSError as error:  # from starting a process, or from a semaphore, which is in /dev/shm
        raise WorkerError(workers, str(error)) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _drawn(batches: Iterator[dict[str, torch.Tensor]], workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Draw batches. A process that dies while it hands one over breaks a connection before its death is noticed.

    PyTorch then raises its own error, from a signal's handler. Without it, WorkerError is raised here.
    """
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:
        time.sleep(NOTICE_SECONDS)
        raise WorkerError(workers, f"DataLoader worker: {type(error).__name__}") from error


def _collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return with_offsets(default_collate(samples))


def _shield_from_signals(worker: int) -> None:
    """In a worker, where `_SIGNALS` are blocked: end on SIGTERM from the rank that it was forked from only.

    Launchers and terminals send signals to whole process groups. A rank that is asked to stop still needs its workers
    to reach the next step, and treats the death of one as a failure.
    """
    threading.Thread(target=_end_with_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _end_with_sigterm_of(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)

"""Batches: which samples each data-parallel rank takes at each step, drawn ahead in worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from griffin.trainer.data.dataset import Samples


def sample_numbers(
    first_sample: int, *, global_batch: int, micro_batch: int, data_rank: int, data_size: int
) -> list[list[int]]:
    """Samples of each micro-batch that data-parallel rank `data_rank` of `data_size` takes at one step.

    The step takes `global_batch` samples from `first_sample` on, whatever the other arguments. Micro-batch m of rank d
    takes `micro_batch` consecutive ones from (m * data_size + d) * micro_batch of them.
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
    """Endless micro-batches of steps that take the samples from number `first_sample` on in turn.

    There are global_batch / (micro_batch * data_size) a step. Each is a dict of the tensors of `Samples` with a leading
    axis: [micro_batch, T], in pinned memory where there is a CUDA device. `workers` processes, forked from this one,
    draw ahead; 0 draws in this process. They heed no signals but those of this process. Raises ValueError if the batch
    sizes do not fit.
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
        num_workers=workers,
        # Stated: the default of a rank that a fork server started is to start a server of its own, which imports
        # everything again.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_shield_from_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws from, and so changes, torch's default generator
    )
    return iter(loader)


def _shield_from_signals(worker: int) -> None:
    """In a worker: drop the handlers of the rank that it was forked from, and obey no signals but that rank's.

    Launchers and terminals send theirs to whole process groups. A rank that is told to stop still needs its workers to
    come to the next step, and takes the death of one for a failure.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _end_with_sigterm_of(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)

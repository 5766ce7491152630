"""Batches: which samples each data-parallel rank takes at each step, drawn ahead in worker processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from griffin.trainer.data.dataset import Samples


def sample_numbers(
    step: int, *, global_batch: int, micro_batch: int, data_rank: int, data_size: int
) -> list[list[int]]:
    """Samples of each micro-batch that data-parallel rank `data_rank` of `data_size` takes at `step` (from 0).

    The steps take consecutive runs of `global_batch` samples, whatever the other arguments. Micro-batch m of rank d
    takes `micro_batch` consecutive ones from (m * data_size + d) * micro_batch of its step's run.
    """
    first = step * global_batch + data_rank * micro_batch
    starts = range(first, (step + 1) * global_batch, data_size * micro_batch)
    return [list(range(start, start + micro_batch)) for start in starts]


def batches(
    samples: Samples,
    *,
    first_step: int,
    global_batch: int,
    micro_batch: int,
    data_rank: int,
    data_size: int,
    workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches from `first_step` (from 0) on, global_batch / (micro_batch * data_size) of them a step.

    Each is a dict of the tensors of `Samples` with a leading axis: [micro_batch, T], in pinned memory where there is a
    CUDA device. `workers` processes draw ahead; 0 draws in this process. Raises ValueError if the batch sizes do not
    fit.
    """
    if min(global_batch, micro_batch, data_size) < 1 or global_batch % (micro_batch * data_size):
        raise ValueError(
            f"global_batch {global_batch}: expected a positive multiple of micro_batch {micro_batch} x {data_size} "
            f"data-parallel ranks"
        )
    if first_step < 0 or not 0 <= data_rank < data_size:
        raise ValueError(f"first_step {first_step}, data_rank {data_rank} of {data_size}: out of range")

    def numbers() -> Iterator[list[int]]:
        step = first_step
        while True:
            yield from sample_numbers(
                step, global_batch=global_batch, micro_batch=micro_batch, data_rank=data_rank, data_size=data_size
            )
            step += 1

    loader = DataLoader(
        samples,
        batch_sampler=numbers(),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws from, and so changes, torch's default generator
    )
    return iter(loader)

"""Clock, bandwidth and rate of products of a device. This module imports torch."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from griffin.tools.bench.kernels.operations import Implementation
from griffin.tools.bench.kernels.rows import Times

FLUSH_BYTES = 2**29  # more than any cache holds
HEAD_START = 2.0  # ms for which the device is kept busy before the timed work
WARM_UP = 2  # untimed rounds


class Clock:
    """Times work on a device in milliseconds: with events on a GPU, else with the wall clock.

    Before the work, a buffer larger than any cache is overwritten repeatedly. The inputs then come from memory, and the
    host has queued the work before the device starts it, so that launch overhead is not included.
    """

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffer = torch.zeros(flush_bytes, dtype=torch.uint8, device=device)
        self._fills = 1
        if self._on_gpu:
            self.time(self._buffer.zero_)
            self._fills = math.ceil(HEAD_START / self.time(self._buffer.zero_)[0])

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Run the work; returns its milliseconds and its result."""
        for _ in range(self._fills):
            self._buffer.zero_()
        if not self._on_gpu:
            begun = time.perf_counter()
            result = work()
            return 1000 * (time.perf_counter() - begun), result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), result


def time_implementations(clock: Clock, implementations: Mapping[str, Implementation], repeats: int) -> dict[str, Times]:
    """Time forward and backward separately, implementations in turn, so that changes of speed affect all of them."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in implementations}
    for number in range(WARM_UP + repeats):
        for name, implementation in implementations.items():
            inputs = implementation.sets[number % len(implementation.sets)]
            forward, outputs = clock.time(partial(implementation.forward, inputs.all))
            backward = clock.time(partial(inputs.gradients, outputs))[0] if inputs.grads else 0.0
            del outputs  # before the next forward
            rounds[name].append((forward, backward))
    return {
        name: Times(*(statistics.median(times) for times in zip(*values[WARM_UP:], strict=True)))
        for name, values in rounds.items()
    }


def copy_bandwidth(clock: Clock, device: torch.device, size: int, repeats: int) -> float:
    """Measure the bytes per second, read plus written, of copying a bfloat16 tensor of `size` bytes."""
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    times = [clock.time(lambda: target.copy_(source))[0] for _ in range(WARM_UP + repeats)]
    return 2 * size / (statistics.median(times[WARM_UP:]) / 1000)


def product_rate(clock: Clock, device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Measure the FLOP/s of a product of two matrices [size, size]."""
    a, b = (torch.empty(size, size, dtype=dtype, device=device).normal_() for _ in range(2))
    times = [clock.time(lambda: torch.mm(a, b))[0] for _ in range(WARM_UP + repeats)]
    return 2 * size**3 / (statistics.median(times[WARM_UP:]) / 1000)


def free_bytes(device: torch.device) -> int:
    """Return the memory available for new tensors, after freeing the allocator's unused memory."""
    gc.collect()
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]

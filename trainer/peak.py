"""What a device can do at best, to hold against what a run makes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of square matrix products of random numbers on `device`, the best of a few, in 1e12 operations a second.

    Takes about a tenth of a second on a GPU, some milliseconds on a CPU; no global random state changes.
    """
    size, products, rounds = (8192, 4, 4) if device.type == "cuda" else (384, 1, 8)
    generator = torch.Generator(device).manual_seed(0)
    # Random: products of constants draw less power, and are faster than those of a training.
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    with torch.no_grad():
        return products * 2 * size**3 / best_seconds(device, multiply, rounds) / 1e12


def best_seconds(device: torch.device, work: Callable[[], object], rounds: int) -> float:
    """The shortest time that `work` takes on `device` over so many rounds, after one that does not count."""
    best = math.inf
    for number in range(rounds + 1):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - begun)
    return best

"""Peak FLOP/s of a device, of which a training uses a share (MFU)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak rate of dense matrix products."""

    tflops: float
    source: str  # "set", "known" or "measured"


# Pattern of the device's name -> TFLOP/s in bfloat16, TF32 and float32; the first match counts. Figures are from the
# vendors' data sheets, without sparsity and at full board power. MI300 and MI200 have float32 matrix units; an MI250X
# is two devices.
KNOWN = (
    (r"GB200", (2500.0, 1250.0, 80.0)),
    (r"B200", (2250.0, 1125.0, 75.0)),
    (r"H100 PCIe", (756.0, 378.0, 51.2)),
    (r"H100 NVL", (835.0, 417.5, 60.0)),
    (r"H200 NVL", (835.0, 417.5, 60.0)),
    (r"H100|H200|H800|GH200", (989.4, 494.7, 66.9)),
    (r"H20", (148.0, 74.0, 44.0)),
    (r"A100|A800", (312.0, 156.0, 19.5)),
    (r"A40", (149.7, 74.8, 37.4)),
    (r"A30", (165.0, 82.0, 10.3)),
    (r"A10", (125.0, 62.5, 31.2)),
    (r"L40S", (362.0, 183.0, 91.6)),
    (r"L40", (181.0, 90.5, 90.5)),
    (r"L4", (121.0, 60.0, 30.3)),
    (r"RTX 4090", (165.2, 82.6, 82.6)),
    (r"RTX 3090", (71.0, 35.6, 35.6)),
    (r"MI300X|MI325X", (1307.4, 653.7, 163.4)),
    (r"MI250X", (191.5, 47.9, 47.9)),
    (r"MI210", (181.0, 45.3, 45.3)),
)


def peak(device: torch.device, dtype: torch.dtype, configured: float) -> Peak:
    """Peak of one device: `configured` (`log.peak_tflops`) unless 0, else the known figure of a GPU, else measured."""
    if configured:
        return Peak(tflops=configured, source="set")
    if device.type == "cuda" and (known := known_tflops(torch.cuda.get_device_name(device), dtype)):
        return Peak(tflops=known, source="known")
    return Peak(tflops=measured_tflops(device, dtype), source="measured")


def known_tflops(name: str, dtype: torch.dtype) -> float | None:
    """The vendor's figure for the GPU of that name; None if unknown, or for a MIG slice."""
    if "MIG" in name:
        return None
    for pattern, (bfloat16, tf32, float32) in KNOWN:
        if re.search(rf"\b(?:{pattern})\b", name):
            if dtype != torch.float32:
                return bfloat16
            return tf32 if torch.backends.cuda.matmul.allow_tf32 else float32
    return None


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of square matrix products on `device`, in TFLOP/s: the best of a few.

    Takes about a tenth of a second on a GPU and some milliseconds on a CPU. No global random state changes.
    """
    size, products, rounds = (8192, 4, 4) if device.type == "cuda" else (384, 1, 8)
    generator = torch.Generator(device).manual_seed(0)
    # Random values: products of constants draw less power, and are faster than those of a training.
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    with torch.no_grad():
        return products * 2 * size**3 / best_seconds(device, multiply, rounds) / 1e12


def best_seconds(device: torch.device, work: Callable[[], object], rounds: int) -> float:
    """The shortest time of `work` on `device` over so many rounds, after a warm-up round."""
    best = math.inf
    for number in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return best

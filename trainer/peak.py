"""What a device can compute at most, for the share of it that a training uses (MFU)."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Dense matrix products, TFLOP/s."""

    tflops: float
    source: str  # "set", "known" or "measured"


# By name of the device, the first that fits: bfloat16, TF32 and float32 without sparsity, TFLOP/s, by the makers' data
# sheets at the boards' full power. MI300 and MI200 have float32 matrix units.
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
    (r"MI250X", (383.0, 95.7, 95.7)),
    (r"MI210", (181.0, 45.3, 45.3)),
)

_SECONDS = 0.1


def peak(device: torch.device, dtype: torch.dtype, configured: float) -> Peak:
    """Of one device: `configured` (`log.peak_tflops`) unless it is 0, the known figure of a GPU, or a measured rate."""
    if configured:
        return Peak(tflops=configured, source="set")
    if device.type == "cuda" and (known := known_tflops(torch.cuda.get_device_name(device), dtype)):
        return Peak(tflops=known, source="known")
    return Peak(tflops=measured_tflops(device, dtype), source="measured")


def known_tflops(name: str, dtype: torch.dtype) -> float | None:
    """The figure of the GPU of that name; None for one that is not known, and for a part of one."""
    if "MIG" in name:
        return None
    for pattern, (bfloat16, tf32, float32) in KNOWN:
        if re.search(rf"\b(?:{pattern})\b", name):
            if dtype != torch.float32:
                return bfloat16
            return tf32 if torch.backends.cuda.matmul.allow_tf32 else float32
    return None


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of large square matrix products on this device, TFLOP/s, found within a fraction of a second."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    out = torch.empty_like(a)

    def product() -> float:
        begun = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    product()  # loads libraries
    until, best = time.perf_counter() + _SECONDS, product()
    while time.perf_counter() < until:
        best = min(best, product())
    return 2 * size**3 / best / 1e12

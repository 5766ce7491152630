"""Selection of the backend of an operation: the reference loop, PyTorch operations for CPUs, or Triton programs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from griffin.kernels.backends import AUTO, BACKENDS

HAS_TRITON = find_spec("triton") is not None


def select_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return the backend for "auto": "triton" on a GPU if Triton is installed, else "cpu", which runs on any device.

    The Triton programs compute in float32, so float64 tensors use "cpu".
    """
    return "triton" if device.type == "cuda" and dtype != torch.float64 and HAS_TRITON else "cpu"


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, setting: str = "backend") -> str:
    """Return the backend to run for tensors of this device and dtype.

    Raises:
        ValueError: the backend is unknown, or is Triton and cannot run on this device or in this dtype. The message
            names `setting`.
    """
    if backend == AUTO:
        return select_backend(device, dtype)
    if backend not in BACKENDS:
        raise ValueError(f"{setting}: {backend!r}; accepted: {', '.join(map(repr, (AUTO, *BACKENDS)))}")
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError(f"{setting}: 'triton'; accepted where the package triton is installed")
        if dtype == torch.float64:
            raise ValueError(f"{setting}: 'triton' for torch.float64; accepted: bfloat16, float16 and float32")
        if device.type not in ("cuda", "meta") and not is_interpreted():
            raise ValueError(f"{setting}: 'triton' on {device}; accepted on a GPU, or with TRITON_INTERPRET=1")
    return backend


def implementation(operation: str, backend: str) -> ModuleType:
    """Import the module with an operation's forward and backward. Lazy, because Triton may not be installed."""
    return import_module(f"griffin.kernels.{operation}.{backend}")


@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Return whether Triton interprets programs on the CPU, which is fixed when they are defined."""
    import triton

    from griffin.kernels.recurrence import programs

    return not isinstance(programs.scan_forward, triton.JITFunction)

"""Which implementation of an operation runs: its definition as a loop, the one made for CPUs, or Triton's programs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from griffin.kernels.backends import AUTO, BACKENDS

HAS_TRITON = find_spec("triton") is not None


def select_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What "auto" is: "triton" for tensors on a GPU where Triton is installed, else "cpu", which runs on any device.

    Triton's programs compute in float32, so that float64 tensors are left to "cpu".
    """
    return "triton" if device.type == "cuda" and dtype != torch.float64 and HAS_TRITON else "cpu"


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, setting: str = "backend") -> str:
    """The backend that runs for tensors on this device.

    Raises:
        ValueError: it is unknown, or is Triton where that cannot run or not in this dtype; names `setting`.
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
    """The module with an operation's forward and backward, imported when asked for: Triton is not everywhere."""
    return import_module(f"griffin.kernels.{operation}.{backend}")


@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Whether Triton's interpreter runs programs on the CPU; it is decided when they are defined."""
    import triton

    from griffin.kernels.recurrence import programs

    return not isinstance(programs.scan_forward, triton.JITFunction)

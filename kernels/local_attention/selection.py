"""Selection of the backend of attention, by device, dtype and head dim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from griffin.kernels.backends import ATTENTION_BACKENDS, AUTO
from griffin.kernels.local_attention import flash, varlen

COUNTED = "counted"  # for meta tensors, in the place of any backend
PACKED = ("flash", "varlen")  # backends that need the documents' offsets
HALF = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY, VARLEN_CAPABILITY = (9, 0), (8, 0)  # compute capability: the only one, and the least
LARGEST_HEAD_DIM, HEAD_DIM_MULTIPLE = 256, 8  # of FlashAttention
# PyTorch runs its backward for these head dims only on GPUs with much shared memory per multiprocessor.
LARGE_MEMORY_HEAD_DIMS, LARGE_MEMORY = range(193, 225), ((8, 0), (9, 0), (10, 0))

Library = Callable[..., Any]
LIBRARIES: dict[str, Callable[[], Library | None]] = {"flash": flash.library, "varlen": varlen.library}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What attention is to run on.

    capability: compute capability of an NVIDIA GPU, None for other devices.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int] | None


def target(device: torch.device, dtype: torch.dtype, head_dim: int) -> Target:
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    capability = torch.cuda.get_device_capability(device) if is_nvidia else None
    return Target(device=device, dtype=dtype, head_dim=head_dim, capability=capability)


def refusal(backend: str, on: Target, libraries: dict[str, Library | None]) -> str | None:
    """Return why a backend cannot run on a target, with what is accepted, or None if it can.

    `libraries` are the functions of "flash" and "varlen", None where they cannot be imported.
    """
    if backend == "flex" and on.device.type != "cuda":
        return f"on {on.device}; accepted on a GPU"
    if backend not in PACKED:
        return None
    if backend == "flash" and on.capability != FLASH_CAPABILITY:
        return f"on {_named(on)}; accepted on NVIDIA GPUs of compute capability 9.0"
    if on.capability is None or on.capability < VARLEN_CAPABILITY:
        return f"on {_named(on)}; accepted on NVIDIA GPUs of compute capability 8.0 and above"
    if on.dtype not in HALF:
        return f"for {on.dtype}; accepted: bfloat16 and float16"
    if on.head_dim > LARGEST_HEAD_DIM or on.head_dim % HEAD_DIM_MULTIPLE:
        return (
            f"for model.head_dim = {on.head_dim}; accepted: multiples of {HEAD_DIM_MULTIPLE} up to {LARGEST_HEAD_DIM}"
        )
    if on.head_dim in LARGE_MEMORY_HEAD_DIMS and on.capability not in LARGE_MEMORY:
        return f"for model.head_dim = {on.head_dim} on {_named(on)}; accepted: up to 192, and from 232 on"
    if libraries[backend] is None:
        return {
            "flash": "without the package flash_attn_interface (FlashAttention 3); accepted where it can be imported",
            "varlen": f"with torch {torch.__version__}; accepted where torch.nn.attention.varlen.varlen_attn takes "
            "window_size and enable_gqa",
        }[backend]
    return None


def _named(on: Target) -> str:
    if on.capability is None:
        return str(on.device)
    major, minor = on.capability
    return f"{on.device} of compute capability {major}.{minor}"


def is_reproducible(backend: str, head_dim: int) -> bool:
    """Return whether gradients are bitwise reproducible."""
    return backend != "flash" or head_dim <= flash.DETERMINISTIC_HEAD_DIM


def choose(backend: str, on: Target, libraries: dict[str, Library | None], setting: str = "backend") -> str:
    """Return the backend to run on a target.

    "auto" takes the first of ATTENTION_BACKENDS that can run and whose gradients are bitwise reproducible.

    Raises ValueError, naming `setting`, if the backend is unknown or cannot run.
    """
    if backend not in (AUTO, *ATTENTION_BACKENDS):
        raise ValueError(f"{setting}: {backend!r}; accepted: {', '.join(map(repr, (AUTO, *ATTENTION_BACKENDS)))}")
    if on.device.type == "meta":
        return COUNTED
    if backend == AUTO:
        return next(
            each
            for each in ATTENTION_BACKENDS
            if is_reproducible(each, on.head_dim) and refusal(each, on, libraries) is None
        )
    if (reason := refusal(backend, on, libraries)) is not None:
        raise ValueError(f"{setting}: {backend!r} {reason}")
    return backend


def resolve_backend(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, setting: str = "backend"
) -> str:
    """Return the backend to run for heads of this device, dtype and size: see `choose`."""
    on = target(device, dtype, head_dim)
    # Imported only where they can run: FlashAttention's package takes seconds.
    found = {name: find() if on.capability is not None else None for name, find in LIBRARIES.items()}
    return choose(backend, on, found, setting)

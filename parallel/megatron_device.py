"""Runs megatron-core on the CPU or on the meta device, and selects the device of a rank.

megatron-core 0.16.1 hard-codes the CUDA device. `install()` redirects exactly those places, and only on machines
without a GPU. Line numbers below are those of megatron-core 0.16.1.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state, utils
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import layers, mappings

_FACTORIES = ("empty", "ones", "tensor", "zeros")

# Modules that create tensors with device="cuda" or device=torch.cuda.current_device(), with the lines.
MODULES = (
    clip_grads,  # 90, 103, 115, 174, 207: the gradient norm and the scale's overflow flag
    distrib_optimizer,  # 791: shards of the optimizer state
    layers,  # 261, 552, 873, 899, 1197, 1218: weights and the sequence-parallel gradient
    mappings,  # 91, 141, 181: gathers and reduce-scatters
    optimizer,  # 473, 481, 485, 1141: overflow flag and loss scale
    p2p_communication,  # 190-202, 313, 321: receive buffers; 242, 398: synchronize
    parallel_state,  # 198: synchronize
    param_and_grad_buffer,  # 783, 800, 806: parameter and gradient buffers
    schedules,  # 596, 983, 2138: the count of tokens
    utils,  # 631: the all-gather buffer of sequence parallelism; 1207: the gradient norm
)


class _Cuda(types.ModuleType):
    """`torch.cuda` with another current device and a no-op synchronize()."""

    def __init__(self, device: torch.device):
        super().__init__("torch.cuda")
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return self._device

    def synchronize(self, *_: Any) -> None:
        pass


class _Torch(types.ModuleType):
    """`torch` whose factory functions replace device="cuda" by another device."""

    def __init__(self, device: torch.device):
        super().__init__("torch")
        self._device = device
        self.cuda = _Cuda(device)
        for name in _FACTORIES:
            setattr(self, name, self._redirected(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def _redirected(self, factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            return factory(*args, device=self._device if device == "cuda" else device, **kwargs)

        return make


def device(local_rank: int = 0) -> torch.device:
    """Return the device of a rank: its GPU, or the CPU on machines without GPUs.

    If the launcher makes only one GPU visible to each rank, it is GPU 0 for every rank. Raises ValueError if several
    GPUs are visible but none is left for this rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 1:
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise ValueError(f"local rank {local_rank}: must be below {gpus}, the number of GPUs that this rank sees")
    return torch.device("cuda", local_rank)


def install() -> None:
    """Redirect megatron-core to the CPU. No effect with a GPU, or when called again."""
    if not torch.cuda.is_available():
        _redirect(torch.device("cpu"))


def _redirect(target: torch.device) -> None:
    proxy = _Torch(target)
    for module in MODULES:
        module.torch = proxy


@contextmanager
def on_meta() -> Iterator[None]:
    """Context in which megatron-core's layers create their weights as meta tensors."""
    before = [module.torch for module in MODULES]
    _redirect(torch.device("meta"))
    try:
        yield
    finally:
        for module, torch_module in zip(MODULES, before, strict=True):
            module.torch = torch_module


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Context in which `tensor.type()` returns the name of a CUDA type also of tensors on the CPU and of meta tensors.

    distrib_optimizer 361-435 and 582 group parameters, and clip_grads 167 checks gradients, by these names.
    """
    if torch.cuda.is_available():
        yield
        return
    plain = torch.Tensor.type

    def named_as_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain(tensor, *args, **kwargs)
        return f"torch.cuda.{answer.rpartition('.')[2]}" if isinstance(answer, str) else answer

    torch.Tensor.type = named_as_cuda  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = plain  # type: ignore[method-assign]

"""megatron-core without a GPU: redirected functions, and no redirection with a GPU."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers

from griffin.parallel import megatron_device

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is redirected")


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Undo `megatron_device.install` for the test, and restore the modules afterwards."""
    before = [module.torch for module in megatron_device.MODULES]
    for module in megatron_device.MODULES:
        module.torch = torch
    yield
    for module, torch_module in zip(megatron_device.MODULES, before, strict=True):
        module.torch = torch_module


@needs_no_gpu
@pytest.mark.parametrize(
    "module", megatron_device.MODULES, ids=lambda module: module.__name__.removeprefix("megatron.core.")
)
def test_the_cuda_device_becomes_the_cpu(module: types.ModuleType) -> None:
    megatron_device.install()
    current = module.torch.cuda.current_device()
    assert current == torch.device("cpu")
    module.torch.cuda.synchronize()
    for device in ("cuda", current, None):
        for tensor in (
            module.torch.empty(2, 3, dtype=torch.int32, device=device),
            module.torch.empty((2, 3), dtype=torch.int32, device=device),
            module.torch.zeros(2, 3, dtype=torch.int32, device=device),
            module.torch.ones(2, 3, dtype=torch.int32, device=device),
            module.torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32, device=device),
        ):
            assert (tensor.device.type, tensor.dtype, tensor.shape) == ("cpu", torch.int32, (2, 3))
    assert module.torch.tensor([5.0], device="cuda").item() == 5


@needs_no_gpu
def test_nothing_else_is_redirected() -> None:
    megatron_device.install()
    proxy = layers.torch
    assert proxy.empty(2, device="meta").is_meta
    assert proxy.zeros(2, device=torch.device("meta")).is_meta
    assert proxy.nn is torch.nn
    assert proxy.distributed is torch.distributed
    assert proxy.cuda.is_available is torch.cuda.is_available
    assert proxy.cuda.Event is torch.cuda.Event
    with pytest.raises(AttributeError, match="no_such_function"):
        _ = proxy.no_such_function
    with pytest.raises((AssertionError, RuntimeError)):  # torch itself has no such device, as before
        torch.empty(2, device="cuda")


@needs_no_gpu
def test_installing_twice_changes_nothing() -> None:
    megatron_device.install()
    megatron_device.install()
    assert layers.torch.empty(2, device="cuda").device.type == "cpu"
    assert layers.torch.nn is torch.nn


@pytest.mark.parametrize("installed", [False, True])
def test_on_meta_allocates_nothing_and_restores(installed: bool) -> None:
    if installed:
        megatron_device.install()
    before = [module.torch for module in megatron_device.MODULES]
    with megatron_device.on_meta():
        assert layers.torch.empty(1 << 40, device="cuda").is_meta
        assert layers.torch.empty(1 << 40, device=layers.torch.cuda.current_device()).is_meta
        assert layers.torch.empty(2, device="cpu").device.type == "cpu"
    assert [module.torch for module in megatron_device.MODULES] == before
    with pytest.raises(ZeroDivisionError), megatron_device.on_meta():
        _ = 1 / 0
    assert [module.torch for module in megatron_device.MODULES] == before


@needs_no_gpu
def test_cuda_type_names_within_only() -> None:
    plain = torch.Tensor.type
    half, single = torch.ones(2, dtype=torch.bfloat16), torch.nn.Parameter(torch.ones(2))
    with megatron_device.cuda_type_names():
        assert half.type() == "torch.cuda.BFloat16Tensor"
        assert single.type() == "torch.cuda.FloatTensor"
        converted = half.type(torch.float64)  # with an argument it is a conversion
        assert torch.equal(converted, torch.ones(2, dtype=torch.float64))
    assert torch.Tensor.type is plain
    assert half.type() == "torch.BFloat16Tensor"
    with pytest.raises(ZeroDivisionError), megatron_device.cuda_type_names():
        _ = 1 / 0
    assert torch.Tensor.type is plain


@needs_no_gpu
def test_gradients_can_be_clipped() -> None:
    """Runs megatron-core's code that asserts a CUDA type and creates CUDA tensors."""
    megatron_device.install()
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    with megatron_device.cuda_type_names():
        clip_grads.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)  # 1 / (5 + 1e-6)


def test_no_effect_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    megatron_device.install()
    assert all(module.torch is torch for module in megatron_device.MODULES)
    plain = torch.Tensor.type
    with megatron_device.cuda_type_names():
        assert torch.Tensor.type is plain
        assert torch.ones(2).type() == "torch.FloatTensor"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert megatron_device.device(3) == torch.device("cuda", 3)
    with pytest.raises(ValueError, match=r"local rank 4: must be below 4"):
        megatron_device.device(4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a launcher shows each rank its own
    assert megatron_device.device(3) == torch.device("cuda", 0)


@needs_no_gpu
def test_device_without_a_gpu() -> None:
    assert megatron_device.device(3) == torch.device("cpu")

"""RMSNorm against its formula in float64, and selection of the implementation."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from griffin.parallel.config import RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.context import Context, megatron_config
from griffin.parallel.layers.norm import RMSNorm, apex_rms_norm
from griffin.parallel.world.grid import single_rank_grid

T, B, D = 5, 3, 48
Make = Callable[[torch.dtype], Any]
APEX = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda")


def formula(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + w)


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Return a function that builds a norm with random weights, the same each time."""
    model = ModelConfig(pattern=(RECURRENT,), width=D, recurrent_width=D, heads=1, head_dim=D)
    layout = ParallelConfig()
    with single_rank_grid() as grid:

        def norm_of(dtype: torch.dtype) -> RMSNorm:
            megatron = megatron_config(model, layout, dtype, grid.device)
            norm = RMSNorm("norm", Context(model=model, grid=grid, megatron=megatron, device=grid.device))
            torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
            return norm

        yield norm_of


def random_input(scale: float, dtype: torch.dtype) -> Tensor:
    x = torch.randn(T, B, D, generator=torch.Generator().manual_seed(2)) * scale
    x[1, 2] = 0
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])  # 1e-3 makes mean(x^2) equal to epsilon
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients(make: Make, scale: float, dtype: torch.dtype) -> None:
    norm, x = make(dtype), random_input(scale, dtype)
    y = norm(x)
    gradient = torch.randn(T, B, D, generator=torch.Generator().manual_seed(3)).to(dtype)
    y.backward(gradient)

    exact_x = x.detach().double().requires_grad_()
    exact_w = norm.weight.detach().double().requires_grad_()
    exact = formula(exact_x, exact_w)
    exact.backward(gradient.double())

    assert y.dtype == dtype
    # Arithmetic is float32 (a few roundings of 6e-8) and the result is rounded once: by 2^-9 in bfloat16.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=0)
    assert exact_x.grad is not None
    assert exact_w.grad is not None
    for actual, expected in ((x.grad, exact_x.grad), (norm.weight.grad, exact_w.grad)):
        # Gradients are differences of larger terms: relative to the largest element.
        assert actual is not None
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_weight_is_described(make: Make) -> None:
    (piece,) = make(torch.float32).weight.pieces
    assert (piece.name, piece.shape, piece.axis) == ("norm.weight", (D,), None)


def install_apex(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Make an `apex` with these functions importable, its compiled extension included."""
    modules = {name: types.ModuleType(name) for name in APEX}
    for name, function in functions.items():
        setattr(modules["apex.normalization.fused_layer_norm"], name, function)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_apex_is_used_if_installed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def fused(x: Tensor, weight: Tensor, normalized_shape: torch.Size, eps: float) -> Tensor:
        calls.append((x.dtype, weight.detach().clone(), tuple(normalized_shape), eps))
        # As Apex: x of any dtype, output in the weight's dtype.
        return formula(x.float(), weight - 1).to(weight.dtype)

    install_apex(monkeypatch, mixed_dtype_fused_rms_norm_affine=fused)
    with monkeypatch.context() as patch:
        pretend_cuda(patch)
        assert apex_rms_norm() is fused
        norm = make(torch.bfloat16)
    x = random_input(1.0, torch.bfloat16)
    y = norm(x)
    ((dtype, weight, shape, epsilon),) = calls
    assert (dtype, shape, epsilon) == (torch.bfloat16, (D,), 1e-6)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, 1 + norm.weight.detach().float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, make(torch.bfloat16)(x), rtol=2**-7, atol=0)  # each rounds once to bfloat16


def test_apex_without_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    install_apex(monkeypatch, mixed_dtype_fused_rms_norm_affine=formula)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert apex_rms_norm() is None


def test_a_foreign_apex_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch)
    with monkeypatch.context() as patch:
        install_apex(patch)  # has the modules but not the function
        assert apex_rms_norm() is None
    with monkeypatch.context() as patch:
        for name in APEX[1:]:
            patch.delitem(sys.modules, name, raising=False)
        patch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # a module without sub-modules
        assert apex_rms_norm() is None


def test_an_apex_built_without_its_extension_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's default build is Python only: its functions exist but fail when called."""
    pretend_cuda(monkeypatch)
    install_apex(monkeypatch, mixed_dtype_fused_rms_norm_affine=formula)
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", None)  # cannot be imported
    assert apex_rms_norm() is None

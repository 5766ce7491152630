"""RMSNorm against its formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from griffin.parallel.config import RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.context import Context, megatron_config
from griffin.parallel.layers.norm import RMSNorm
from griffin.parallel.world.grid import single_rank_grid

T, B, D = 5, 3, 48
Make = Callable[[torch.dtype], Any]


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

"""Values and gradients of an operation, beside those of its definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Leaves = dict[str, Tensor]
Operation = Callable[..., Any]  # a tensor, or several, of leaves by name and a backend

FLOAT32 = 1e-5  # sums of at most some hundred float32 terms; the largest error seen is 1e-6
ROUNDING = {torch.float64: 1e-12, torch.float32: FLOAT32, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def results(operation: Operation, leaves: Leaves, backend: str) -> dict[str, Tensor]:
    """What the operation returns, and the gradient of each leaf for random gradients of all of that."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    found = operation(**leaves, backend=backend)
    found = (found,) if isinstance(found, Tensor) else tuple(found)
    generator = torch.Generator().manual_seed(1)
    # In digits that every dtype has: gradients are the same for the definition in float64.
    grads = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in found]
    gradients = torch.autograd.grad(found, list(leaves.values()), grads)
    values = {f"result {place}": y.detach() for place, y in enumerate(found)}
    return values | dict(zip(leaves, gradients, strict=True))


def assert_right(
    operation: Operation, leaves: Leaves, backend: str, scale: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Values and gradients are those of the definition in float64, to the rounding of each one's own dtype, or `dtype`.

    Errors are relative to each tensor's largest value, and at least 1; `scale` multiplies what is allowed.
    """
    found = results(operation, leaves, backend)
    expected = results(operation, {name: leaf.double() for name, leaf in leaves.items()}, "reference")
    for name, value in found.items():
        size = expected[name].abs().max().clamp(min=1.0) if value.numel() else 1.0
        error = (value.double() - expected[name]).abs().max() / size if value.numel() else 0.0
        # Triton's interpreter cuts digits off where a GPU rounds.
        allowed = ROUNDING[dtype or value.dtype] * scale * (2 if backend == "triton" else 1)
        assert error <= allowed, f"{name}: error {error:.1e} > {allowed:.0e}"


def assert_same_bits(operation: Operation, leaves: Leaves, backend: str) -> None:
    first, second = (results(operation, leaves, backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

"""Random inputs of the RG-LRU, its results and gradients, and their comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from griffin.kernels.rglru import rglru

Leaves = dict[str, Any]  # by the names below; None for no branch, no initial state or no gate biases
LEAVES = ("x", "input_gate", "recurrence_gate", "decay", "branch", "initial_state", "gate_bias")
SEQUENCES = ("x", "input_gate", "recurrence_gate", "branch")  # [T, B, R]
# float32 sums of some hundred terms against float64; the largest error seen is 1e-6.
FLOAT32 = 1e-5


def make(
    steps: int,
    batch: int,
    width: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    decay_range: tuple[float, float] = (-9.0, -2.0),
    gate_scale: float = 2.0,
    state: bool = False,
    branch: bool = False,
) -> Leaves:
    """Return random inputs as leaves. The default range of decays gives a between .3 and 1.

    With a branch, gates have biases.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, batch, width, generator=generator, dtype=torch.float64)
    gates = torch.randn(2, steps, batch, width, generator=generator, dtype=torch.float64) * gate_scale
    low, high = decay_range
    decay = torch.rand(width, generator=generator, dtype=torch.float64) * (high - low) + low
    initial = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    z = torch.randn(steps, batch, width, generator=generator, dtype=torch.float64) * 2
    bias = torch.randn(2, width, generator=generator, dtype=torch.float64)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    values = (
        x.to(dtype),
        *gates.to(dtype),
        decay.to(accumulation),
        z.to(dtype) if branch else None,
        initial.to(accumulation) if state else None,
        bias.to(dtype) if branch else None,
    )
    return {
        name: value if value is None else value.requires_grad_() for name, value in zip(LEAVES, values, strict=True)
    }


def run(inputs: Leaves, *, starts: Tensor | None = None, seed: int = 1, **options) -> dict[str, Tensor]:
    """Return both results and the gradient of every leaf, for random gradients of both results."""
    y, final = rglru(**inputs, starts=starts, **options)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, final)]
    leaves = {name: leaf for name, leaf in inputs.items() if leaf is not None}
    found = torch.autograd.grad((y, final), list(leaves.values()), grads)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, found, strict=True))}


def as_float64(inputs: Leaves) -> Leaves:
    return {k: None if v is None else v.detach().double().requires_grad_() for k, v in inputs.items()}


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, scales: dict[str, Tensor] | None = None
) -> None:
    """Compare each tensor's largest error relative to its largest value, or to its entry in `scales`."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = (scales or {}).get(name, expected[name]).abs().max().clamp(min=1e-30)
        error = (value.double() - expected[name].double()).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def decay_terms(inputs: Leaves, grads: dict[str, Tensor]) -> Tensor:
    """Return the summed magnitudes of the terms of decay's gradient, [R]; the terms themselves may nearly cancel."""
    bias = inputs.get("gate_bias")
    closed = 1 - (inputs["recurrence_gate"] + (0 if bias is None else bias[1])).sigmoid()
    terms = grads["recurrence_gate"].abs() / closed
    return terms.sum((0, 1)) * inputs["decay"].sigmoid() / torch.nn.functional.softplus(inputs["decay"])

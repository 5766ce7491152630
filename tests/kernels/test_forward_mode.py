"""Forward-mode differentiation of every public operation gives the derivative or an error, and never drops tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from griffin.kernels.conv1d import causal_conv1d
from griffin.kernels.gated_gelu import gated_gelu
from griffin.kernels.linear_cross_entropy import linear_cross_entropy
from griffin.kernels.linear_scan import linear_scan
from griffin.kernels.local_attention import attention_mask, multi_query_attention
from griffin.kernels.rglru import rglru, rglru_step
from griffin.kernels.rms_norm import add_rms_norm
from griffin.kernels.rotary import rotary_cos_sin, rotary_qkv
from tests.kernels.interpreter import needs_interpreter

SHAPE = (5, 2, 3)
REFERENCES = ("linear_scan", "rglru", "causal_conv1d", "linear_cross_entropy")  # have one that PyTorch differentiates
TRITON = pytest.param("triton", marks=needs_interpreter)


def first(function: Callable[..., tuple[Tensor, ...]], names: str, **options: Any) -> Callable[..., Tensor]:
    """Return a function of positional tensors that concatenates the results."""
    return lambda *tensors: torch.cat(
        [result.flatten() for result in function(**dict(zip(names.split(), tensors, strict=True)), **options)]
    )


def operation(name: str, backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return an operation as a function of tensors, and its arguments."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if name == "linear_scan":
        tensors = (random(*SHAPE), random(*SHAPE), random(*SHAPE[1:]))
        return first(linear_scan, "a b initial_state", backend=backend), tensors
    if name == "rglru":
        names = "x input_gate recurrence_gate branch decay initial_state"
        return first(rglru, names, backend=backend), (*random(4, *SHAPE), random(3), random(*SHAPE[1:]))
    if name == "rglru_step":
        step = rglru_step(torch.zeros(3), backend)

        def stepped(x: Tensor, gate: Tensor, state: Tensor) -> Tensor:
            return step(x, gate, gate, gate, state.clone())

        return stepped, tuple(random(3, 3, 2))
    if name == "linear_cross_entropy":
        labels = torch.randint(4, SHAPE[:2], generator=generator)
        pair = (random(*SHAPE), random(4, 3))
        return lambda hidden, table: linear_cross_entropy(hidden, table, labels, backend=backend)[0], pair
    if name == "causal_conv1d":
        tensors = (random(*SHAPE), random(4, 3), random(3))
        return lambda *leaves: causal_conv1d(*leaves, backend=backend), tensors
    if name == "gated_gelu":
        return lambda x, bias: gated_gelu(x, bias, backend=backend), (random(5, 2, 6), random(6))
    if name == "add_rms_norm":
        return first(add_rms_norm, "x branch weight", backend=backend), (*random(2, *SHAPE), random(3))
    if name == "rotary":
        angles = rotary_cos_sin(torch.arange(5)[:, None].expand(-1, 2), 8)
        return first(rotary_qkv, "qkv", angles=angles, heads=1, backend=backend), (random(5, 2, 24),)
    mask = attention_mask(torch.zeros(2, 5, dtype=torch.int64), 3, backend=backend)
    return lambda q, k, v: multi_query_attention(q, k, v, mask), (
        random(5, 2, 2, 16),
        random(5, 2, 16),
        random(5, 2, 16),
    )


OPERATORS = ("linear_scan", "rglru", "causal_conv1d", "gated_gelu", "add_rms_norm")
OPERATIONS = [
    pytest.param(name, *getattr(backend, "values", (backend,)), marks=getattr(backend, "marks", ()))
    for name in (*OPERATORS, "rglru_step", "rotary", "linear_cross_entropy")
    for backend in ("cpu", TRITON, "reference")
] + [("attention", "sdpa"), ("attention", "flex")]


def derivative(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Return the directional derivative by finite differences in float32."""
    step = 1e-3
    ahead, behind = (
        function(*(tensor + sign * step * tangent for tensor, tangent in zip(tensors, tangents, strict=True)))
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("name", "backend"), OPERATIONS)
def test_jvp_is_right_or_raises(name: str, backend: str) -> None:
    function, tensors = operation(name, backend)
    tangents = tuple(torch.ones_like(tensor) for tensor in tensors)
    expected = derivative(function, tensors, tangents)
    assert expected.abs().max() > 0.1
    try:
        found = torch.func.jvp(function, tensors, tangents)[1]
    except (NotImplementedError, RuntimeError):
        assert (name, backend) not in {(n, "reference") for n in (*OPERATORS, *REFERENCES, "rotary")}
    else:
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["cpu", TRITON])
@pytest.mark.parametrize("name", sorted({*OPERATORS, *REFERENCES}))
def test_refuses_under_transforms(name: str, backend: str) -> None:
    """In any order of jvp and vmap, also if only the gradient has a tangent."""
    function, tensors = operation(name, backend)
    refused = pytest.raises(NotImplementedError, match='backend="reference"')
    rest = tensors[1:]

    def of_first(x: Tensor) -> Tensor:
        return function(x, *rest)

    x = tensors[0]
    many = torch.stack([x, 2 * x])
    with refused:
        torch.func.jacfwd(of_first)(x)
    with refused:
        torch.func.jvp(torch.func.vmap(of_first), (many,), (many,))
    with refused:
        torch.func.vmap(lambda one: torch.func.jvp(of_first, (one,), (one,)))(many)
    with torch.autograd.forward_ad.dual_level(), refused:
        of_first(torch.autograd.forward_ad.make_dual(x, x))
    leaf = x.clone().requires_grad_()
    y = of_first(leaf)
    with torch.autograd.forward_ad.dual_level(), refused:
        torch.autograd.grad(y, leaf, torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))
    # Tensors without tangents are accepted.
    tangent = torch.func.jvp(lambda scale: scale * of_first(x), (torch.ones(()),), (torch.ones(()),))[1]
    torch.testing.assert_close(tangent, of_first(x))

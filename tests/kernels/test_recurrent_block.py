"""The recurrent block between its linears, in one piece, against its operations' definitions in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from griffin.kernels.conv1d import causal_conv1d
from griffin.kernels.recurrent_block import recurrent_block
from tests.kernels.interpreter import BACKENDS, needs_interpreter
from tests.kernels.oracle import ROUNDING, assert_right, assert_same_bits, results

pytestmark = pytest.mark.usefixtures("poisoned")


def make(
    steps: int, batch: int, blocks: int, block: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = blocks * block
    shapes = {
        "xy": (steps, batch, 2 * width),
        "conv_weight": (4, width),
        "conv_bias": (width,),
        "gate_weight": (blocks, block, 2 * block),
        "gate_bias": (2, width),
    }
    leaves = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    leaves["gate_weight"] = leaves["gate_weight"] / block**0.5
    return leaves | {"decay": (torch.rand(width, generator=generator) * 7 - 9).to(dtype)}


def flags(steps: int, batch: int, seed: int = 0) -> Tensor:
    return torch.rand(steps, batch, generator=torch.Generator().manual_seed(seed)) < 0.1


def check(steps, batch, blocks, block, dtype, save_states, seed, backend):
    operation = partial(recurrent_block, starts=flags(steps, batch, seed), save_states=save_states)
    # What half precision rounds on the way is x, the gates, the states and the gradients of x and of the gates.
    scale = 10 if dtype in (torch.float32, torch.float64) else 20
    leaves = make(steps, batch, blocks, block, dtype=dtype, seed=seed)
    assert_right(operation, leaves, backend, scale, dtype)


SHAPES = {
    "batch": st.integers(1, 3),
    "blocks": st.integers(1, 3),
    "block": st.integers(1, 5),
    "save_states": st.booleans(),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=40)
@given(steps=st.integers(1, 40), dtype=st.sampled_from(tuple(ROUNDING)), **SHAPES)
def test_any_shape_and_dtype(steps, batch, blocks, block, dtype, save_states, seed):
    check(steps, batch, blocks, block, dtype, save_states, seed, "cpu")


@needs_interpreter
@settings(max_examples=4)
@given(steps=st.integers(1, 12), dtype=st.sampled_from(tuple(ROUNDING)[1:]), **SHAPES)
def test_any_shape_and_dtype_on_triton(steps, batch, blocks, block, dtype, save_states, seed):
    check(steps, batch, blocks, block, dtype, save_states, seed, "triton")


@BACKENDS
def test_recomputation_and_repeated_backward_are_bitwise(backend):
    leaves = make(14, 2, 2, 3)
    assert_same_bits(recurrent_block, leaves, backend)
    expected = results(recurrent_block, leaves, backend)
    without_states = results(partial(recurrent_block, save_states=False), leaves, backend)
    again = results(
        lambda backend, **given: checkpoint(partial(recurrent_block, backend=backend), **given, use_reentrant=False),
        leaves,
        backend,
    )
    for name, value in expected.items():
        assert torch.equal(value, without_states[name]), name
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("result", [0, 1])
def test_gradient_of_one_result_only(result):
    leaves = make(9, 2, 2, 3, dtype=torch.float64)
    grads = []
    for backend in ("cpu", "reference"):
        given = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        y = recurrent_block(**given, backend=backend)[result]
        grads.append(
            torch.autograd.grad(y.square().sum(), list(given.values()), allow_unused=True, materialize_grads=True)
        )
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gates_can_be_looked_at(backend):
    leaves = make(9, 2, 2, 3)
    seen: list[tuple[Tensor, Tensor]] = []
    y, _ = recurrent_block(**leaves, backend=backend, observe=lambda *gates: seen.append(gates))
    assert torch.equal(y, recurrent_block(**leaves, backend=backend)[0])
    x = causal_conv1d(leaves["xy"][..., :6], leaves["conv_weight"], leaves["conv_bias"])
    weight, bias = leaves["gate_weight"], leaves["gate_bias"]
    expected = torch.einsum("tbni,nio->tbno", x.unflatten(-1, (2, 3)), weight).chunk(2, -1)
    ((input_gate, recurrence_gate),) = seen
    torch.testing.assert_close(input_gate, expected[0].flatten(2) + bias[0])
    torch.testing.assert_close(recurrence_gate, expected[1].flatten(2) + bias[1])


@pytest.mark.parametrize(("save_states", "kept"), [(True, 6), (False, 5)])
def test_saves(save_states, kept):
    """xy, which is twice as wide, x, both gates and the states."""
    leaves = {name: leaf.requires_grad_() for name, leaf in make(64, 2, 2, 8, dtype=torch.bfloat16).items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        recurrent_block(**leaves, save_states=save_states)
    activations = [tensor for tensor in saved if tensor.numel() >= 64 * 2 * 16]
    assert {tensor.dtype for tensor in activations} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in activations) == kept * 64 * 2 * 16


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("xy", torch.zeros(4, 2, 13)),
        ("xy", torch.zeros(4, 12)),
        ("conv_weight", torch.zeros(6)),
        ("conv_weight", torch.zeros(4, 5)),
        ("conv_bias", torch.zeros(5)),
        ("gate_weight", torch.zeros(4, 3, 6)),
        ("gate_weight", torch.zeros(2, 3, 3)),
        ("gate_weight", torch.zeros(2, 3, 6, dtype=torch.bfloat16)),
        ("gate_bias", torch.zeros(12)),
        ("decay", torch.zeros(2, 3)),
        ("starts", torch.zeros(2, 4, dtype=torch.bool)),
        ("backend", "cuda"),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        recurrent_block(**make(4, 2, 2, 3) | {name: value})


@needs_interpreter
def test_refuses_other_widths_on_triton():
    with pytest.raises(ValueError, match=r"^conv_weight: 3 taps; backend 'triton' has 4"):
        recurrent_block(**make(4, 2, 2, 3) | {"conv_weight": torch.zeros(3, 6)}, backend="triton")

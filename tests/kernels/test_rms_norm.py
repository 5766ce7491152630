"""RMSNorm, alone and of a sum, against its definition in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin.kernels.rms_norm import add_rms_norm, cpu, ops, rms_norm
from tests.kernels.interpreter import BACKENDS, needs_interpreter
from tests.kernels.oracle import assert_right, assert_same_bits, results

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = pytest.mark.parametrize("branch", [False, True])


def make(
    *shape: int, branch: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.5
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        # Quarters, so that x + branch is a number of every dtype: where it is rounded, y and gradients are other ones.
        return (torch.randn(*shape, generator=generator) * scale * 4).round() / 4

    leaves = {"x": random(*shape), "branch": random(*shape), "weight": random(shape[-1]) / 4}
    return {name: leaf.to(dtype) for name, leaf in leaves.items() if branch or name != "branch"}


def operation(branch: bool):
    return add_rms_norm if branch else rms_norm


def check(leading: list[int], width: int, branch: bool, dtype: torch.dtype, seed: int, backend: str) -> None:
    leaves = make(*leading, width, branch=branch, dtype=dtype, seed=seed)
    # A row of few, small numbers is multiplied by up to 1 / sqrt(epsilon), and so are its errors.
    assert_right(partial(operation(branch), epsilon=0.1), leaves, backend, scale=3)


@settings(max_examples=60)
@given(
    leading=st.lists(st.integers(0, 9), max_size=3),
    width=st.integers(1, 70),
    branch=st.booleans(),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    tile=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_dtype(leading, width, branch, dtype, tile, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE_ELEMENTS", tile)
        check(leading, width, branch, dtype, seed, "cpu")


@needs_interpreter
@settings(max_examples=10)
@given(
    leading=st.lists(st.integers(0, 9), max_size=2),
    width=st.one_of(st.integers(1, 70), st.just(600)),
    branch=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_dtype_on_triton(leading, width, branch, dtype, seed):
    from griffin.kernels.rms_norm import triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "SPREAD", 0.05)  # few programs with several rows each
        check(leading, width, branch, dtype, seed, "triton")


@BACKENDS
@OPERATIONS
def test_default_epsilon(backend, branch):
    """Of rows with no size but epsilon's, and of rows so large that epsilon is nothing."""
    leaves = make(6, 12, branch=branch, dtype=torch.float32)
    factors = torch.tensor([0.0, 1e-4, 1.0, 1.0, 1e4, 1e12])[:, None]
    leaves = {name: leaf if name == "weight" else leaf * factors for name, leaf in leaves.items()}
    found = results(operation(branch), leaves, backend)
    expected = results(operation(branch), {name: leaf.double() for name, leaf in leaves.items()}, "reference")
    for name in ("x", f"result {int(branch)}"):
        sizes = expected[name].abs().amax(1, keepdim=True).clamp(min=1e-30)
        assert ((found[name] - expected[name]).abs() / sizes).max() < 1e-5, name


@BACKENDS
def test_the_sum_is_rounded_before_it_is_normalised(backend):
    """So that the backward, which reads the sum, is that of the forward."""
    x, branch = torch.full((1, 4), 256.0).bfloat16(), torch.ones(1, 4).bfloat16()  # 257 is no bfloat16
    total, y = add_rms_norm(x, branch, torch.zeros(4).bfloat16(), backend=backend)
    assert torch.equal(total, x + branch)
    assert torch.equal(y, rms_norm(total, torch.zeros(4).bfloat16(), backend=backend))


@BACKENDS
@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_result_only(backend, used):
    leaves = make(5, 12, branch=True)
    grads = []
    for kind, factor in ((backend, torch.float32), ("reference", torch.float64)):
        given = {name: leaf.to(factor).requires_grad_() for name, leaf in leaves.items()}
        result = add_rms_norm(**given, backend=kind)[used]
        grads.append(
            torch.autograd.grad(result.square().sum(), list(given.values()), allow_unused=True, materialize_grads=True)
        )
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@BACKENDS
@OPERATIONS
def test_strides_change_nothing(backend, branch):
    leaves = make(5, 3, 16, branch=branch)
    expected = results(operation(branch), leaves, backend)
    changes = (
        lambda x: torch.cat([x, x[..., :4]], -1)[..., :16],  # rows apart
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
    )
    for change in changes:
        strided = {
            name: leaf.repeat_interleave(2)[::2] if name == "weight" else change(leaf) for name, leaf in leaves.items()
        }
        assert not any(leaf.is_contiguous() for leaf in strided.values())
        found = results(operation(branch), strided, backend)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


@BACKENDS
@OPERATIONS
def test_repeats_bitwise(backend, branch):
    assert_same_bits(operation(branch), make(30, 10, branch=branch), backend)


@BACKENDS
def test_a_weight_of_another_dtype(backend):
    leaves = make(4, 8, branch=True, dtype=torch.bfloat16)
    leaves["weight"] = leaves["weight"].float()
    found = results(add_rms_norm, leaves, backend)
    assert (found["x"].dtype, found["weight"].dtype) == (torch.bfloat16, torch.float32)
    assert_right(add_rms_norm, leaves, backend, scale=2)


@BACKENDS
def test_operators_are_what_they_claim(backend):
    """Fake implementations, autograd and mutation, as torch.library.opcheck sees them."""
    x, branch, weight = make(9, 6, branch=True, dtype=torch.bfloat16).values()
    scale = torch.rand(9)
    torch.library.opcheck(ops.backward, (x, branch, x, weight, scale, backend))
    torch.library.opcheck(ops.backward, (x[:, :6], None, x, weight, scale, backend))
    x, branch, weight = (leaf.requires_grad_() for leaf in (x, branch, weight))
    torch.library.opcheck(ops.forward, (x, branch, weight, 1e-6, backend))
    torch.library.opcheck(ops.forward, (x, None, weight, 1e-6, backend))


@OPERATIONS
def test_gradcheck(branch):
    leaves = [leaf.double().requires_grad_() for leaf in make(4, 6, branch=branch).values()]
    assert torch.autograd.gradcheck(operation(branch), leaves)


@OPERATIONS
def test_saves_one_tensor_and_a_number_a_row(branch):
    leaves = {name: leaf.requires_grad_() for name, leaf in make(7, 10, branch=branch, dtype=torch.bfloat16).items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        operation(branch)(**leaves)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in saved] == [
        ((7, 10), torch.bfloat16),
        ((10,), torch.bfloat16),
        ((7,), torch.float32),
    ]


@needs_interpreter
def test_refuses_rows_that_registers_cannot_hold():
    with pytest.raises(ValueError, match=r"^x: rows of 8193; backend 'triton' has up to 8192"):
        rms_norm(torch.zeros(1, 8193), torch.zeros(8193), backend="triton")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(())),
        ("x", torch.zeros(4, 0)),
        ("x", torch.zeros(4, 6, dtype=torch.int32)),
        ("weight", torch.zeros(3)),
        ("weight", torch.zeros(6, dtype=torch.int64)),
        ("weight", torch.zeros(6, device="meta")),
        ("backend", "cuda"),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        rms_norm(**(make(4, 6) | {name: value}))


@pytest.mark.parametrize("value", [torch.zeros(3, 6), torch.zeros(4, 6).half(), torch.zeros(4, 6, device="meta")])
def test_refuses_branches(value):
    with pytest.raises(ValueError, match=r"^branch: "):
        add_rms_norm(**(make(4, 6, branch=True) | {"branch": value}))

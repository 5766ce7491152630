"""The gated GeLU against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin.kernels.gated_gelu import cpu, gated_gelu, ops
from tests.kernels.interpreter import BACKENDS, needs_interpreter
from tests.kernels.oracle import assert_right, assert_same_bits, results

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.5) -> dict[str, Tensor]:
    """x of this shape [..., 2 F], and its bias."""
    generator = torch.Generator().manual_seed(seed)
    x, bias = (torch.randn(size, generator=generator, dtype=torch.float64) * scale for size in (shape, shape[-1:]))
    return {"x": x.to(dtype), "bias": bias.to(dtype)}


def check(leading: list[int], width: int, dtype: torch.dtype, seed: int, backend: str) -> None:
    # A bias's gradient sums as many terms as there are tokens, each at most some units.
    assert_right(gated_gelu, make(*leading, 2 * width, dtype=dtype, seed=seed), backend, scale=2)


@settings(max_examples=60)
@given(
    leading=st.lists(st.integers(0, 9), max_size=3),
    width=st.integers(1, 40),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    tile=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_dtype(leading, width, dtype, tile, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE_ELEMENTS", tile)
        check(leading, width, dtype, seed, "cpu")


@needs_interpreter
@settings(max_examples=8)
@given(
    leading=st.lists(st.integers(0, 9), max_size=2),
    width=st.one_of(st.integers(1, 5), st.sampled_from([256, 300])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_dtype_on_triton(leading, width, dtype, seed):
    from griffin.kernels.gated_gelu import triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "SHORTEST_CHUNK", 8)
        patch.setattr(triton, "SPREAD", 0.02)  # several programs with several tiles each
        check(leading, width, dtype, seed, "triton")


# NumPy, with which the interpreter computes, warns of infinity.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@BACKENDS
def test_far_from_zero(backend):
    """Where the GeLU is its argument or nothing, and the derivative one or nothing."""
    assert_right(gated_gelu, make(6, 20, scale=40.0), backend)


@BACKENDS
def test_strides_change_nothing(backend):
    given = make(5, 3, 16)
    expected = results(gated_gelu, given, backend)
    x, bias = given["x"], given["bias"]
    wider = torch.cat([x, torch.randn(5, 3, 4)], -1)[..., :16]  # rows apart
    for strided in (wider, x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert not strided.is_contiguous()
        found = results(gated_gelu, {"x": strided, "bias": bias.repeat_interleave(2)[::2]}, backend)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


@BACKENDS
def test_repeats_bitwise(backend):
    assert_same_bits(gated_gelu, make(70, 10), backend)


@BACKENDS
def test_biases_of_another_dtype(backend):
    given = make(4, 6, dtype=torch.bfloat16)
    found = results(gated_gelu, given | {"bias": given["bias"].float()}, backend)
    assert (found["x"].dtype, found["bias"].dtype) == (torch.bfloat16, torch.float32)
    assert_right(gated_gelu, given | {"bias": given["bias"].float()}, backend)


@BACKENDS
def test_operators_are_what_they_claim(backend):
    """Fake implementations, autograd and mutation, as torch.library.opcheck sees them."""
    x, bias = (leaf.requires_grad_() for leaf in make(9, 6, dtype=torch.bfloat16).values())
    torch.library.opcheck(ops.forward, (x, bias, backend))
    torch.library.opcheck(ops.backward, (x.detach()[:, :3], x.detach(), bias.detach(), backend))


def test_gradcheck():
    given = [leaf.requires_grad_() for leaf in make(4, 6, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(gated_gelu, given)


def test_saves_pre_activations_alone():
    x, bias = (leaf.requires_grad_() for leaf in make(7, 10).values())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        gated_gelu(x, bias)
    assert [tensor.shape for tensor in saved] == [x.shape, bias.shape]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(4, 7)),
        ("x", torch.zeros(())),
        ("x", torch.zeros(4, 0)),
        ("x", torch.zeros(4, 6, dtype=torch.int32)),
        ("bias", torch.zeros(3)),
        ("bias", torch.zeros(6, dtype=torch.int64)),
        ("bias", torch.zeros(6, device="meta")),
        ("backend", "cuda"),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        gated_gelu(**(make(4, 6) | {name: value}))

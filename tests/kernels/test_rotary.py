"""Rotary embedding against its definition in float64, and that against transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin.kernels.rotary import apply_rotary, ops, rotary_cos_sin, rotary_qkv
from tests.kernels.interpreter import BACKENDS, needs_interpreter
from tests.kernels.oracle import FLOAT32, assert_right, assert_same_bits, results

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(
    steps: int, batch: int, heads: int, head_dim: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(steps, batch, (heads + 2) * head_dim, generator=generator, dtype=torch.float64)
    return {"qkv": qkv.to(dtype)}


def places(steps: int, batch: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 5000, (steps, batch), generator=torch.Generator().manual_seed(seed))


def operation(steps: int, batch: int, heads: int, head_dim: int, seed: int = 0) -> Callable[..., tuple[Tensor, ...]]:
    """Angles are float32 for every dtype: at 5000 radians they are as exact as 3e-4."""
    return partial(rotary_qkv, angles=rotary_cos_sin(places(steps, batch, seed), head_dim), heads=heads)


SHAPES = {"steps": st.integers(1, 9), "batch": st.integers(1, 3), "heads": st.integers(1, 5)}


@settings(max_examples=60)
@given(
    **SHAPES,
    quarter=st.integers(1, 9),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_dtype(steps, batch, heads, quarter, dtype, seed):
    sizes = (steps, batch, heads, 4 * quarter)
    assert_right(operation(*sizes, seed), make(*sizes, dtype=dtype, seed=seed), "cpu")


@needs_interpreter
@settings(max_examples=8)
@given(**SHAPES, quarter=st.integers(1, 9), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_any_shape_and_dtype_on_triton(steps, batch, heads, quarter, dtype, seed):
    from griffin.kernels.rotary import triton

    sizes = (steps, batch, heads, 4 * quarter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "TILE", 128)  # several programs
        assert_right(operation(*sizes, seed), make(*sizes, dtype=dtype, seed=seed), "triton")


@BACKENDS
def test_gradients_of_any_strides(backend):
    """As FlexAttention gives those of q, and as broadcast ones."""
    sizes = (5, 2, 3, 8)
    qkv = make(*sizes)["qkv"].requires_grad_()
    q, k, v = operation(*sizes)(qkv, backend=backend)
    grad_q = torch.randn(2, 3, 5, 8).permute(2, 0, 1, 3)
    grad_k, grad_v = torch.randn(2, 5, 8).transpose(0, 1), torch.randn(5, 2, 1).expand(-1, -1, 8)
    grads = (grad_q, grad_k, grad_v)
    (found,) = torch.autograd.grad((q, k, v), qkv, grads, retain_graph=True)
    (expected,) = torch.autograd.grad((q, k, v), qkv, [grad.contiguous() for grad in grads])
    assert torch.equal(found, expected)


@BACKENDS
def test_strides_of_the_input_change_nothing(backend):
    sizes = (5, 3, 2, 8)
    leaves = make(*sizes)
    expected = results(operation(*sizes), leaves, backend)
    for strided in (leaves["qkv"].transpose(0, 1).contiguous().transpose(0, 1), leaves["qkv"].mT.contiguous().mT):
        found = results(operation(*sizes), {"qkv": strided}, backend)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter's NumPy
@BACKENDS
def test_values_pass(backend):
    """Whatever is beside them: what is not a number stays in its head."""
    qkv = make(3, 1, 2, 8)["qkv"]
    qkv[0] = float("inf")
    q, k, v = operation(3, 1, 2, 8)(qkv, backend=backend)
    assert torch.equal(v, qkv[..., -8:])
    assert torch.equal(q[..., 4:].flatten(2), qkv.unflatten(-1, (4, 8))[:, :, :2, 4:].flatten(2))
    assert k[1:].isfinite().all()


@BACKENDS
def test_repeats_bitwise(backend):
    assert_same_bits(operation(7, 2, 3, 8), make(7, 2, 3, 8), backend)


@BACKENDS
def test_operators_are_what_they_claim(backend):
    """Fake implementations, autograd and mutation, as torch.library.opcheck sees them."""
    qkv, angles = make(4, 2, 3, 8, dtype=torch.bfloat16)["qkv"].requires_grad_(), rotary_cos_sin(places(4, 2), 8)
    torch.library.opcheck(ops.forward, (qkv, *angles, 3, backend))
    grad_q, grad_k = torch.randn(2, 3, 4, 8).permute(2, 0, 1, 3), torch.randn(4, 2, 8)
    torch.library.opcheck(ops.backward, (grad_q, grad_k, grad_k, *angles, backend))


def test_gradcheck():
    leaf = make(3, 2, 2, 8, dtype=torch.float64)["qkv"].requires_grad_()
    assert torch.autograd.gradcheck(operation(3, 2, 2, 8), [leaf])


def test_saves_angles_alone():
    sizes = (4, 2, 3, 8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        results_ = operation(*sizes)(make(*sizes)["qkv"].requires_grad_())
    assert [tuple(tensor.shape) for tensor in saved] == [(4, 2, 2)] * 2
    assert len({tensor.untyped_storage().data_ptr() for tensor in results_}) == 3


@pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.float32), (16, torch.float64), (12, torch.float32)])
def test_agrees_with_transformers(head_dim, dtype):
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = transformers.RecurrentGemmaConfig(head_dim=head_dim)
    positions = torch.arange(40).unsqueeze(1).repeat(1, 2)
    positions[25:, 1] -= 25
    leaves = make(40, 2, 3, head_dim, dtype=dtype)

    def theirs(qkv: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (5, head_dim)).split((3, 1, 1), 2)
        cos, sin = modeling.RecurrentGemmaRotaryEmbedding(config)(v, positions.t())
        q, k = modeling.apply_rotary_pos_emb(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), cos, sin)
        return q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3).squeeze(2), v.squeeze(2)

    def ours(qkv: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        return rotary_qkv(qkv, rotary_cos_sin(positions, head_dim), 3, backend=backend)

    found, expected = (results(function, leaves, "cpu") for function in (ours, theirs))
    for name, value in found.items():
        # Angles are float32 whatever the dtype: at 40 radians that is 4e-6.
        torch.testing.assert_close(value, expected[name], rtol=0, atol=4 * FLOAT32)


def test_is_relative():
    """Scores depend on the distance of query and key only, and the second half of each head passes."""
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def turned(x: Tensor, position: int) -> Tensor:
        return apply_rotary(x, rotary_cos_sin(torch.tensor(position), 16, torch.float64))

    def score(query_at: int, key_at: int) -> Tensor:
        return (turned(q, query_at) * turned(k, key_at)).sum()

    torch.testing.assert_close(score(1007, 1000), score(7, 0), rtol=1e-12, atol=1e-12)
    assert (score(8, 0) - score(7, 0)).abs() > 1e-3
    assert torch.equal(turned(q, 5)[..., 8:], q[..., 8:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(6, 40)),
        ("qkv", torch.zeros(6, 2, 42)),
        ("qkv", torch.zeros(6, 2, 40, dtype=torch.int64)),
        ("qkv", torch.zeros(0, 2, 40)),
        ("angles' cosine", (torch.zeros(2, 6, 2), torch.zeros(6, 2, 2))),
        ("angles' sine", (torch.zeros(6, 2, 2), torch.zeros(6, 2, 2, device="meta"))),
        ("angles' sine", (torch.zeros(6, 2, 2), torch.zeros(6, 2, 2, dtype=torch.bfloat16))),
        ("backend", "cuda"),
    ],
)
def test_refuses(name, value):
    arguments = make(6, 2, 3, 8) | {"angles": rotary_cos_sin(places(6, 2), 8), "heads": 3}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        rotary_qkv(**arguments | {name.split("'")[0]: value})

"""The causal convolution against its definition in float64, against itself cut up, and against transformers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin.kernels.conv1d import causal_conv1d, cpu
from griffin.kernels.conv1d.reference import causal_conv1d_reference

LEAVES = ("x", "weight", "bias")
FLOAT32 = 1e-5  # sums of at most some hundred float32 terms; the largest error seen is 1e-6
FLOAT64 = 1e-12  # the same algebra in another order


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    """In deterministic mode torch.empty is filled with NaN: a buffer read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(steps: int, batch: int, width: int, taps: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((steps, batch, width), (taps, width), (width,))
    leaves = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return {name: leaf.requires_grad_() for name, leaf in zip(LEAVES, leaves, strict=True)}


def gradients(y: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the gradient of each input, for a random gradient of y."""
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    found = torch.autograd.grad(y, list(inputs.values()), grad)
    return {"y": y.detach(), **dict(zip(inputs, found, strict=True))}


def oracle(inputs: dict[str, Tensor], starts: Tensor | None) -> dict[str, Tensor]:
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.items()}
    return gradients(causal_conv1d_reference(**wide, starts=starts, window=None), wide)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest error of each tensor relative to its largest value."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = expected[name].abs().max().clamp(min=1e-30)
        error = (value.double() - expected[name].double()).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


@example(steps=3, batch=1, width=1, taps=6, tile=1, starts={2}, seed=0)  # taps reach before the sequence
@settings(max_examples=60)
@given(
    steps=st.integers(1, 40),
    batch=st.integers(1, 3),
    width=st.integers(1, 9),
    taps=st.integers(1, 6),
    tile=st.integers(1, 400),
    starts=st.one_of(st.none(), st.sets(st.integers(0, 119), max_size=20)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_taps_tiling_and_starts(steps, batch, width, taps, tile, starts, seed):
    inputs = make(steps, batch, width, taps, seed=seed)
    flags = None
    if starts is not None:
        flags = torch.zeros(steps, batch, dtype=torch.bool)
        flags.view(-1)[[place % flags.numel() for place in starts]] = True
    with mock.patch.object(cpu, "TILE_ELEMENTS", tile):
        found = gradients(causal_conv1d(**inputs, starts=flags), inputs)
    assert_close(found, oracle(inputs, flags), FLOAT32)


def test_default_tiling():
    inputs = make(170, 1, 1001, dtype=torch.float64)
    assert len(list(cpu._spans(inputs["x"]))) > 1
    starts = torch.rand(170, 1, generator=torch.Generator().manual_seed(2)) < 0.05
    assert_close(gradients(causal_conv1d(**inputs, starts=starts), inputs), oracle(inputs, starts), FLOAT64)


def test_strides_change_nothing():
    inputs = make(20, 3, 5)
    y = causal_conv1d(**inputs)
    strided = {"x": inputs["x"].detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()}
    strided["weight"] = inputs["weight"].detach().t().contiguous().t().requires_grad_()
    strided["bias"] = inputs["bias"].detach().repeat_interleave(2)[::2].requires_grad_()
    assert not any(leaf.is_contiguous() for leaf in strided.values())
    assert_close(gradients(causal_conv1d(**strided), strided), gradients(y, inputs), 0.0)

    starts = torch.rand(20, 3, generator=torch.Generator().manual_seed(2)) < 0.1
    batch_major = inputs | {"x": inputs["x"].detach().transpose(0, 1).contiguous()}
    y_batch_major = causal_conv1d(**batch_major, starts=starts.t(), batch_first=True)
    assert torch.equal(y_batch_major.transpose(0, 1), causal_conv1d(**inputs, starts=starts))
    assert y_batch_major.is_contiguous()


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision(dtype, epsilon):
    """Sums are float32: the only errors are those of rounding each result once."""
    inputs = make(200, 2, 33, dtype=dtype)
    starts = torch.rand(200, 2, generator=torch.Generator().manual_seed(2)) < 0.05
    found = gradients(causal_conv1d(**inputs, starts=starts), inputs)
    assert all(value.dtype == dtype for value in found.values())
    assert_close(found, oracle(inputs, starts), epsilon)


def test_gradcheck():
    inputs = make(9, 2, 3, dtype=torch.float64)
    starts = torch.zeros(9, 2, dtype=torch.bool)
    starts[[3, 5, 6], [0, 1, 1]] = True
    with mock.patch.object(cpu, "TILE_ELEMENTS", 24):
        assert torch.autograd.gradcheck(lambda *leaves: causal_conv1d(*leaves, starts=starts), tuple(inputs.values()))


def test_packed_documents_equal_documents_apart():
    lengths = (1, 2, 3, 20, 1, 9)
    inputs = make(sum(lengths), 2, 5, dtype=torch.float64)
    starts = torch.zeros(sum(lengths), 2, dtype=torch.bool)
    starts[[sum(lengths[:i]) for i in range(len(lengths))]] = True
    documents = inputs["x"].split(lengths)
    apart = torch.cat([causal_conv1d(document, inputs["weight"], inputs["bias"]) for document in documents])
    packed = causal_conv1d(**inputs, starts=starts)
    assert_close(gradients(packed, inputs), gradients(apart, inputs), FLOAT64)


def test_agrees_with_transformers():
    """RecurrentGemma's torch.nn.Conv1d: [R, 1, K] weights whose last tap is the current token; one document."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = transformers.RecurrentGemmaConfig(lru_width=6, hidden_size=8, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = modeling.RecurrentGemmaRecurrentBlock(config, layer_idx=0).conv_1d
    inputs = make(17, 2, 6)
    inputs["weight"] = conv.weight.detach()[:, 0].t().requires_grad_()
    inputs["bias"] = conv.bias.detach().requires_grad_()
    x = inputs["x"].detach().requires_grad_()
    theirs = conv(x.permute(1, 2, 0))[..., :17].permute(2, 0, 1)
    expected = gradients(theirs, {"x": x, "weight": conv.weight, "bias": conv.bias})
    expected["weight"] = expected["weight"][:, 0].t()
    assert_close(gradients(causal_conv1d(**inputs), inputs), expected, FLOAT32)


def test_saves_x_only():
    inputs = make(64, 2, 16, dtype=torch.bfloat16)
    starts = torch.zeros(64, 2, dtype=torch.bool)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        causal_conv1d(**inputs, starts=starts)
    assert sum(tensor.numel() for tensor in saved) == 64 * 2 * 16 + 4 * 16 + 64 * 2
    assert [tensor.dtype for tensor in saved if tensor.numel() == 64 * 2 * 16] == [torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(4, 3)),
        ("x", torch.zeros(0, 2, 3)),
        ("x", torch.zeros(4, 2, 3, dtype=torch.int32)),
        ("weight", torch.zeros(3, 4)),
        ("weight", torch.zeros(3, 1, 4)),
        ("weight", torch.zeros(4, 3, dtype=torch.int32)),
        ("bias", torch.zeros(4)),
        ("bias", torch.zeros(3, device="meta")),
        ("starts", torch.zeros(2, 4, dtype=torch.bool)),
        ("starts", torch.zeros(4, 2)),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        causal_conv1d(**(make(4, 2, 3) | {name: value}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpu():
    inputs = make(301, 3, 65, dtype=torch.float64)
    starts = torch.rand(301, 3, generator=torch.Generator().manual_seed(2)) < 0.05
    there = {name: leaf.detach().cuda().requires_grad_() for name, leaf in inputs.items()}
    y = causal_conv1d(**there, starts=starts.cuda())
    expected_y = causal_conv1d(**inputs, starts=starts)
    found = torch.autograd.grad(y.square().sum(), list(there.values()))
    expected = torch.autograd.grad(expected_y.square().sum(), list(inputs.values()))
    for ours, theirs in zip((y, *found), (expected_y, *expected), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0.0, atol=FLOAT64 * theirs.abs().max().item())

"""Causal convolution against the float64 reference, on split sequences, and against transformers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin.kernels.conv1d import causal_conv1d, cpu, ops
from tests.kernels.interpreter import BACKENDS, needs_interpreter

pytestmark = pytest.mark.usefixtures("poisoned")

LEAVES = ("x", "weight", "bias", "initial_window")
STEPS = {"cpu": 200, "triton": 40}  # Triton's interpreter takes some milliseconds a step
FLOAT32 = 1e-5  # sums of at most some hundred float32 terms; the largest error seen is 1e-6
FLOAT64 = 1e-12  # the same algebra in another order


def make(
    steps: int,
    batch: int,
    width: int,
    taps: int = 4,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    window: bool = False,
):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((steps, batch, width), (taps, width), (width,), (taps - 1, batch, width))[: 3 + window]
    leaves = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return {name: leaf.requires_grad_() for name, leaf in zip(LEAVES, leaves, strict=False)}


def gradients(y: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return y and the gradient of each input, for a random gradient of y."""
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    found = torch.autograd.grad(y, list(inputs.values()), grad)
    return {"y": y.detach(), **dict(zip(inputs, found, strict=True))}


def oracle(inputs: dict[str, Tensor], starts: Tensor | None) -> dict[str, Tensor]:
    wide: dict[str, Any] = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.items()}
    return gradients(causal_conv1d(**wide, starts=starts, backend="reference"), wide)


def flags_at(places: set[int] | None, steps: int, batch: int) -> Tensor | None:
    if places is None:
        return None
    flags = torch.zeros(steps, batch, dtype=torch.bool)
    flags.view(-1)[[place % flags.numel() for place in places]] = True
    return flags


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor's largest error relative to its largest value."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = expected[name].abs().max().clamp(min=1e-30)
        error = (value.double() - expected[name].double()).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


STARTS = st.one_of(st.none(), st.sets(st.integers(0, 119), max_size=20))


@example(steps=3, batch=1, width=1, taps=6, tile=1, starts={2}, window=False, seed=0)  # taps reach before the sequence
@settings(max_examples=60)
@given(
    steps=st.integers(1, 40),
    batch=st.integers(1, 3),
    width=st.integers(1, 9),
    taps=st.integers(1, 6),
    tile=st.integers(1, 400),
    starts=STARTS,
    window=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_taps_tiling_and_starts(steps, batch, width, taps, tile, starts, window, seed):
    inputs = make(steps, batch, width, taps, seed=seed, window=window and taps > 1)
    flags = flags_at(starts, steps, batch)
    with mock.patch.object(cpu, "TILE_ELEMENTS", tile):
        found = gradients(causal_conv1d(**inputs, starts=flags, backend="cpu"), inputs)
    assert_close(found, oracle(inputs, flags), FLOAT32)


def chunks_of(steps):
    from griffin.kernels.conv1d import triton

    return mock.patch.multiple(triton, MIN_CHUNK=steps, MAX_CHUNK=steps)


def triton_shape(steps, batch, width, chunk, starts, window, seed):
    inputs = make(steps, batch, width, seed=seed, window=window)
    flags = flags_at(starts, steps, batch)
    with chunks_of(chunk):
        found = gradients(causal_conv1d(**inputs, starts=flags, backend="triton"), inputs)
    assert_close(found, oracle(inputs, flags), FLOAT32)


TRITON_SHAPES = given(
    # Up to five rounds of loads and what is left over, in up to five chunks.
    steps=st.integers(1, 42),
    batch=st.integers(1, 2),
    width=st.one_of(st.integers(1, 3), st.sampled_from([64, 65, 130])),
    chunk=st.sampled_from([8, 16, 64]),
    starts=STARTS,
    window=st.booleans(),
    seed=st.integers(0, 2**31),
)
test_any_shape_on_triton = needs_interpreter(settings(max_examples=5)(TRITON_SHAPES(triton_shape)))
test_many_shapes_on_triton = needs_interpreter(
    pytest.mark.slow(settings(max_examples=100)(TRITON_SHAPES(triton_shape)))
)


def test_default_tiling():
    inputs = make(170, 1, 1001, dtype=torch.float64)
    assert len(list(cpu.spans(inputs["x"]))) > 1
    starts = torch.rand(170, 1, generator=torch.Generator().manual_seed(2)) < 0.05
    assert_close(gradients(causal_conv1d(**inputs, starts=starts), inputs), oracle(inputs, starts), FLOAT64)


@needs_interpreter
@pytest.mark.slow
def test_starts_at_every_place_around_a_chunk():
    """One sequence for each place of a start before, at and after the first step of a chunk and of a round."""
    steps = 20
    inputs = make(steps, steps, 2, window=True)
    starts = torch.eye(steps, dtype=torch.bool)
    with chunks_of(8):
        found = gradients(causal_conv1d(**inputs, starts=starts, backend="triton"), inputs)
    assert_close(found, oracle(inputs, starts), FLOAT32)


@BACKENDS
def test_strides_change_nothing(backend):
    inputs = make(20, 3, 5, window=True)
    y = causal_conv1d(**inputs, backend=backend)
    strided = {"x": inputs["x"].detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()}
    strided["weight"] = inputs["weight"].detach().t().contiguous().t().requires_grad_()
    strided["bias"] = inputs["bias"].detach().repeat_interleave(2)[::2].requires_grad_()
    window = inputs["initial_window"].detach()
    strided["initial_window"] = window.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not any(leaf.is_contiguous() for leaf in strided.values())
    assert_close(gradients(causal_conv1d(**strided, backend=backend), strided), gradients(y, inputs), 0.0)

    starts = torch.rand(20, 3, generator=torch.Generator().manual_seed(2)) < 0.1
    names = ("x", "initial_window")
    batch_major = inputs | {name: inputs[name].detach().transpose(0, 1).contiguous() for name in names}
    y_batch_major = causal_conv1d(**batch_major, starts=starts.t(), batch_first=True, backend=backend)
    assert torch.equal(y_batch_major.transpose(0, 1), causal_conv1d(**inputs, starts=starts, backend=backend))
    assert y_batch_major.is_contiguous()


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@BACKENDS
def test_half_precision(backend, dtype, epsilon):
    """Sums are float32, so each result is rounded only once."""
    steps = STEPS[backend]
    inputs = make(steps, 2, 33, dtype=dtype, window=True)
    starts = torch.rand(steps, 2, generator=torch.Generator().manual_seed(2)) < 0.05
    found = gradients(causal_conv1d(**inputs, starts=starts, backend=backend), inputs)
    assert all(value.dtype == dtype for value in found.values())
    # Triton's interpreter cuts digits off where a GPU rounds.
    assert_close(found, oracle(inputs, starts), epsilon * (2 if backend == "triton" else 1))


@BACKENDS
def test_documents_do_not_leak(backend):
    """Values of another document do not leak, including NaN."""
    inputs = make(12, 1, 3)
    starts = torch.zeros(12, 1, dtype=torch.bool)
    starts[[3, 9]] = True
    clean = gradients(causal_conv1d(**inputs, starts=starts, backend=backend), inputs)
    with torch.no_grad():
        inputs["x"][[1, 10]] = float("nan")
    y = causal_conv1d(**inputs, starts=starts, backend=backend)
    assert torch.equal(y[3:9], clean["y"][3:9])
    assert y[[1, 2, 10, 11]].isnan().all()
    grad = torch.ones_like(y)
    grad[[0, 11]] = float("nan")
    (grad_x,) = torch.autograd.grad(y, inputs["x"], grad)
    assert grad_x[1:9].isfinite().all()


@BACKENDS
def test_a_sequence_in_two_parts_equals_one(backend):
    """The second part continues from the last window of the first."""
    inputs = make(30, 2, 5)
    starts = torch.zeros(30, 2, dtype=torch.bool)
    starts[[18, 25], [0, 1]] = True
    whole = gradients(causal_conv1d(**inputs, starts=starts, backend=backend), inputs)
    x, taps = inputs["x"], (inputs["weight"], inputs["bias"])
    first = causal_conv1d(x[:17], *taps, starts=starts[:17], backend=backend)
    second = causal_conv1d(x[17:], *taps, starts=starts[17:], initial_window=x[14:17], backend=backend)
    assert_close(gradients(torch.cat([first, second]), inputs), whole, FLOAT32)


@BACKENDS
def test_is_deterministic(backend):
    inputs = make(30, 2, 5, window=True)
    first, second = (gradients(causal_conv1d(**inputs, backend=backend), inputs) for _ in range(2))
    assert_close(first, second, 0.0)


@BACKENDS
def test_opcheck(backend):
    """torch.library.opcheck of fake implementations, autograd and mutation."""
    inputs = make(9, 2, 3, window=True, dtype=torch.bfloat16)
    x = inputs["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    starts = torch.arange(18).view(9, 2) % 7 == 3
    given = (x, inputs["weight"], inputs["bias"])
    torch.library.opcheck(ops.forward, (*given, starts, inputs["initial_window"], inputs["bias"], backend))
    few = {"test_utils": ("test_faketensor", "test_aot_dispatch_static")}
    torch.library.opcheck(ops.forward, (*given, None, None, None, backend), **few)


@BACKENDS
@pytest.mark.parametrize("window", [False, True])
def test_an_input_bias_is_added_to_x_and_not_to_the_window(backend, window):
    """The operator's only: the public function has none."""
    inputs = make(23, 2, 5, window=window)
    starts = torch.arange(46).view(23, 2) % 7 == 3
    input_bias = torch.randn(5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    found, expected = [], []
    for results, x, bias in (
        (found, inputs["x"], input_bias),
        (expected, inputs["x"] + input_bias, None),
    ):
        given = (x, inputs["weight"], inputs["bias"], starts, inputs.get("initial_window"), bias, backend)
        y = ops.forward(*given)
        leaves = [*inputs.values(), input_bias]
        results += [y, *torch.autograd.grad(y.square().sum(), leaves)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)  # float32 sums of 46 squares


def test_gradcheck():
    inputs = make(9, 2, 3, dtype=torch.float64, window=True)
    starts = torch.zeros(9, 2, dtype=torch.bool)
    starts[[3, 5, 6], [0, 1, 1]] = True
    with mock.patch.object(cpu, "TILE_ELEMENTS", 24):
        assert torch.autograd.gradcheck(
            lambda *leaves: causal_conv1d(**dict(zip(LEAVES, leaves, strict=True)), starts=starts),
            tuple(inputs.values()),
        )


def test_packed_documents_equal_separate_documents():
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


def test_saves_only_x_for_backward():
    inputs = make(64, 2, 16, dtype=torch.bfloat16)
    starts = torch.zeros(64, 2, dtype=torch.bool)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        causal_conv1d(**inputs, starts=starts)
    assert sum(tensor.numel() for tensor in saved) == 64 * 2 * 16 + 4 * 16 + 64 * 2
    assert [tensor.dtype for tensor in saved if tensor.numel() == 64 * 2 * 16] == [torch.bfloat16]


@needs_interpreter
def test_refuses_other_widths_on_triton():
    with pytest.raises(ValueError, match=r"^weight: 3 taps; backend 'triton' has 4"):
        causal_conv1d(**make(4, 2, 3, taps=3), backend="triton")


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
        ("initial_window", torch.zeros(4, 2, 3)),
        ("initial_window", torch.zeros(3, 2, 3, dtype=torch.int32)),
        ("backend", "cuda"),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        causal_conv1d(**(make(4, 2, 3) | {name: value}))

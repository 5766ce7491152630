"""The RG-LRU against its definition in float64, against itself cut up, and against transformers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from griffin.kernels.linear_scan import cpu as scan_cpu
from griffin.kernels.linear_scan.cpu import Tiling
from griffin.kernels.rglru import rglru

Leaves = dict[str, Any]  # by the names below; None for an initial state that is not given
LEAVES = ("x", "input_gate", "recurrence_gate", "decay", "initial_state")
# float32 sums of some hundred terms against float64; the largest error seen is 1e-6.
FLOAT32 = 1e-5
# The same algebra in another order in float64.
FLOAT64 = 1e-11


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    """In deterministic mode torch.empty is filled with NaN: a buffer read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
) -> Leaves:
    """Random inputs as leaves. Decays in the default range give a between .3 and 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, batch, width, generator=generator, dtype=torch.float64)
    gates = torch.randn(2, steps, batch, width, generator=generator, dtype=torch.float64) * gate_scale
    low, high = decay_range
    decay = torch.rand(width, generator=generator, dtype=torch.float64) * (high - low) + low
    initial = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    values = (x.to(dtype), *gates.to(dtype), decay.to(accumulation), initial.to(accumulation) if state else None)
    return {
        name: value if value is None else value.requires_grad_() for name, value in zip(LEAVES, values, strict=True)
    }


def run(inputs: Leaves, *, starts: Tensor | None = None, seed: int = 1, **options) -> dict[str, Tensor]:
    """Both results and the gradient of every leaf, for random gradients of both results."""
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
    """Largest error of each tensor relative to its largest value, or to what `scales` says."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = (scales or {}).get(name, expected[name]).abs().max().clamp(min=1e-30)
        error = (value.double() - expected[name].double()).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def decay_terms(inputs: Leaves, grads: dict[str, Tensor]) -> Tensor:
    """[R], the sizes of the terms of decay's gradient, summed: with few channels the terms may all but cancel."""
    closed = 1 - inputs["recurrence_gate"].sigmoid()
    terms = grads["recurrence_gate"].abs() / closed
    return terms.sum((0, 1)) * inputs["decay"].sigmoid() / torch.nn.functional.softplus(inputs["decay"])


@settings(max_examples=60)
@given(
    steps=st.integers(1, 70),
    batch=st.integers(1, 3),
    width=st.integers(1, 9),
    tile=st.integers(1, 500),
    step=st.integers(1, 100),
    starts=st.one_of(st.none(), st.sets(st.integers(0, 209), max_size=20)),
    state=st.booleans(),
    batch_first=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_tiling_and_starts(steps, batch, width, tile, step, starts, state, batch_first, seed):
    inputs = make(steps, batch, width, seed=seed, state=state)
    if batch_first:
        inputs |= {n: inputs[n].detach().transpose(0, 1).contiguous().requires_grad_() for n in LEAVES[:3]}
    flags = None
    if starts is not None:
        flags = torch.zeros(inputs["x"].shape[:2], dtype=torch.bool)
        flags.view(-1)[[place % flags.numel() for place in starts]] = True
    options = {"starts": flags, "batch_first": batch_first}
    with mock.patch.multiple(scan_cpu, TILE_ELEMENTS=tile, STEP_ELEMENTS=step):
        found = run(inputs, backend="cpu", **options)
    wide = as_float64(inputs)
    expected = run(wide, backend="reference", **options)
    # Single numbers that may all but cancel are compared with the size of their terms.
    scales = {"decay": decay_terms(wide, expected), "final": expected["y"], "initial_state": torch.ones(1)}
    assert_close(found, expected, FLOAT32, scales=scales)


@pytest.mark.parametrize(("steps", "batch", "width"), [(701, 1, 257), (150, 3, 1001)])
def test_default_tiling(steps, batch, width):
    """Long enough for several tiles of several chunks, the last one partly empty."""
    inputs = make(steps, batch, width, dtype=torch.float64, state=True)
    tiling = Tiling.of(inputs["x"])
    assert len(list(tiling.spans())) > 1
    assert tiling.chunks > 1
    assert steps % tiling.tile
    starts = torch.rand(steps, batch, generator=torch.Generator().manual_seed(2)) < 0.02
    found = run(inputs, starts=starts, backend="cpu")
    assert_close(found, run(inputs, starts=starts, backend="reference"), FLOAT64)


@pytest.mark.parametrize(
    ("decay_range", "gate_scale"),
    [((-20.0, -14.0), 2.0), ((-6.0, -4.0), 30.0), ((3.0, 12.0), 2.0), ((-16.0, 12.0), 8.0)],
    ids=["a near 1", "saturated gates", "a near 0", "both"],
)
def test_extreme_decays(decay_range, gate_scale):
    """1 - a^2 keeps its digits, and the bound on the derivative of its root acts, where a is all but 1."""
    inputs = make(200, 2, 33, decay_range=decay_range, gate_scale=gate_scale, state=True)
    starts = torch.zeros(200, 2, dtype=torch.bool)
    starts[50] = True
    found = run(inputs, starts=starts, backend="cpu")
    assert all(value.isfinite().all() for value in found.values())
    # Gradients that pass the bound are 1000 times others': their sums over time cancel in float32.
    assert_close(found, run(as_float64(inputs), starts=starts, backend="reference"), 5e-5)


def test_bounded_derivative():
    """One channel with a = 1 - 1e-9: dy/dlog a = x m' a state-free step, with m' at most 1000 * 2 a^2."""
    decay = torch.full((1,), -19.0, dtype=torch.float64).requires_grad_()
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    gate = torch.zeros_like(x)
    expected = 0.5 * 2000 * 8 * 0.5 * decay.detach().sigmoid()  # i x, m', and d(-log a) = 8 r softplus'
    for backend in ("reference", "cpu"):
        starts = torch.zeros(1, 1, dtype=torch.bool)
        y, _ = rglru(x, gate, gate, decay, starts=starts, backend=backend)
        (grad,) = torch.autograd.grad(y, decay)
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0.0)  # a^2 is 1 to 1e-8


def test_first_token_of_a_document_forgets_exactly():
    inputs = make(5, 1, 3, state=True)
    starts = torch.tensor([[False], [False], [True], [False], [False]])
    y, _ = rglru(**inputs, starts=starts)
    # a = 0 and m = 1 exactly, so bitwise
    assert torch.equal(y[2], inputs["input_gate"][2].sigmoid() * inputs["x"][2])
    grads = torch.autograd.grad(y[2:].sum(), [inputs[name] for name in ("x", "initial_state")])
    assert grads[0][:2].count_nonzero() == 0
    assert grads[1].count_nonzero() == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_position_0_without_starts(backend):
    """One document: it starts at position 0 exactly if there is no state to go on from."""
    inputs = make(4, 2, 3, dtype=torch.float64)
    first = torch.zeros(4, 2, dtype=torch.bool)
    first[0] = True
    assert_close(run(inputs, backend=backend), run(inputs, starts=first, backend=backend), 0.0)
    going_on = inputs | {"initial_state": torch.zeros(2, 3, dtype=torch.float64)}
    y, final = rglru(**inputs, starts=torch.zeros_like(first), backend=backend)
    same_y, same_final = rglru(**going_on, backend=backend)
    assert torch.equal(y, same_y)
    assert torch.equal(final, same_final)
    assert not torch.equal(y[0], rglru(**inputs, backend=backend)[0][0])


def test_strides_change_nothing():
    """Gates that are halves of one tensor, x with another order of axes: bitwise the result of contiguous tensors."""
    inputs = make(40, 3, 7, state=True)
    expected = run(inputs)
    both = torch.cat([inputs["input_gate"], inputs["recurrence_gate"]], -1).detach()
    strided = {
        "x": inputs["x"].detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_(),
        "input_gate": both[..., :7].detach().requires_grad_(),
        "recurrence_gate": both[..., 7:].detach().requires_grad_(),
        "decay": inputs["decay"].detach().repeat_interleave(2)[::2].requires_grad_(),
        "initial_state": inputs["initial_state"].detach().t().contiguous().t().requires_grad_(),
    }
    assert not any(leaf.is_contiguous() for leaf in strided.values())
    assert_close(run(strided), expected, 0.0)

    y, _ = rglru(**inputs)
    batch_major = {n: inputs[n].transpose(0, 1).contiguous() if n in LEAVES[:3] else inputs[n] for n in LEAVES}
    y_batch_major, _ = rglru(**batch_major, batch_first=True)
    assert torch.equal(y_batch_major, y.transpose(0, 1))
    assert y_batch_major.is_contiguous()


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision(dtype, epsilon):
    """Errors are those of rounding y and each gradient once, and y where the backward reads it as the state."""
    inputs = make(300, 2, 33, dtype=dtype, state=True)
    starts = torch.zeros(300, 2, dtype=torch.bool)
    starts[[0, 100, 101]] = True
    found = run(inputs, starts=starts, backend="cpu")
    expected = run(as_float64(inputs), starts=starts, backend="reference")
    assert {name: value.dtype for name, value in found.items()} == {
        "y": dtype,
        "final": torch.float32,
        **{name: inputs[name].dtype for name in LEAVES},
    }
    assert_close(found, expected, 2 * epsilon)
    # No state is rounded on the way to the last one.
    assert_close({"final": found["final"]}, {"final": expected["final"]}, FLOAT32)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    inputs = make(7, 2, 3, dtype=torch.float64, decay_range=(-3.0, 0.0), state=True)  # 1 - a^2 is far above the bound
    starts = torch.zeros(7, 2, dtype=torch.bool)
    starts[3, 0] = starts[4, 1] = True

    def call(*leaves):
        return rglru(**dict(zip(LEAVES, leaves, strict=True)), starts=starts, backend=backend)

    with mock.patch.multiple(scan_cpu, TILE_ELEMENTS=24, STEP_ELEMENTS=12):  # two tiles of two chunks
        assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("result", [0, 1])
def test_gradient_of_one_result_only(result):
    inputs = make(50, 2, 5, dtype=torch.float64, state=True)
    grads = []
    for backend in ("cpu", "reference"):
        output = rglru(**inputs, backend=backend)[result]
        found = torch.autograd.grad(output.square().sum(), list(inputs.values()))
        grads.append(dict(zip(LEAVES, found, strict=True)))
    assert_close(*grads, FLOAT64)


def test_a_sequence_in_two_parts_equals_one():
    inputs = make(90, 2, 5, dtype=torch.float64, state=True)
    starts = torch.zeros(90, 2, dtype=torch.bool)
    starts[[20, 60], [0, 1]] = True
    cut = 37
    sequences = {name: inputs[name] for name in LEAVES[:3]}

    def in_parts():
        state, parts = inputs["initial_state"], []
        for part in (slice(None, cut), slice(cut, None)):
            pieces = {name: tensor[part] for name, tensor in sequences.items()}
            y, state = rglru(**pieces, decay=inputs["decay"], starts=starts[part], initial_state=state)
            parts.append(y)
        return torch.cat(parts), state

    results = {}
    for name, (y, state) in (("parts", in_parts()), ("whole", rglru(**inputs, starts=starts))):
        grads = torch.autograd.grad(y.square().sum() + state.sum(), list(inputs.values()))
        results[name] = {"y": y, "final": state, **dict(zip(LEAVES, grads, strict=True))}
    assert_close(results["parts"], results["whole"], FLOAT64)


def test_packed_documents_equal_documents_apart():
    lengths = (1, 2, 3, 40, 1, 25)
    inputs = make(sum(lengths), 2, 5, dtype=torch.float64)
    del inputs["initial_state"]
    starts = torch.zeros(sum(lengths), 2, dtype=torch.bool)
    starts[[sum(lengths[:i]) for i in range(len(lengths))]] = True
    packed, last = rglru(**inputs, starts=starts)
    pieces = zip(*(inputs[name].split(lengths) for name in LEAVES[:3]), strict=True)
    apart = [rglru(*piece, inputs["decay"]) for piece in pieces]
    y = torch.cat([document for document, _ in apart])
    results = []
    for output, final in ((packed, last), (y, apart[-1][1])):
        grads = torch.autograd.grad(output.square().sum() + final.sum(), list(inputs.values()))
        results.append({"y": output, "final": final, **dict(zip(inputs, grads, strict=True))})
    assert_close(*results, FLOAT64)


def test_agrees_with_transformers():
    """RecurrentGemma's RG-LRU in float32, with resets, which it handles in the recurrence."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    steps, batch, heads, block = 33, 2, 3, 4
    width = heads * block
    config = transformers.RecurrentGemmaConfig(lru_width=width, num_attention_heads=heads, hidden_size=width)
    theirs = modeling.RecurrentGemmaRglru(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(batch, steps, width, generator=generator).requires_grad_()
    positions = torch.arange(steps).repeat(batch, 1)
    positions[1, 10:] -= 10
    y_theirs = theirs(x, positions)

    def gate(name):
        weight, bias = (getattr(theirs, f"{name}_gate_{part}") for part in ("weight", "bias"))
        blocks = x.unflatten(-1, (heads, block))
        return (torch.einsum("bthi,hij->bthj", blocks, weight) + bias).flatten(2)

    y, final = rglru(
        x, gate("input"), gate("recurrent"), theirs.recurrent_param, starts=positions == 0, batch_first=True
    )
    weights = dict(theirs.named_parameters()) | {"x": x}
    results = []
    for output, last in ((y, final), (y_theirs, theirs.recurrent_states)):
        grads = torch.autograd.grad(output.square().sum(), list(weights.values()), retain_graph=True)
        results.append({"y": output, "final": last, **dict(zip(weights, grads, strict=True))})
    # They take 1 - a^2 from a rounded a^2: its relative error is 1e-7 over the smallest 1 - a^2 here, about 1e-2.
    assert_close(*results, 5e-5)


def test_recomputation_and_repeated_backward_are_bitwise():
    inputs = make(60, 2, 5, state=True)
    expected = run(inputs)
    assert_close(run(inputs), expected, 0.0)

    y, _ = checkpoint(lambda **leaves: rglru(**leaves), **inputs, use_reentrant=False)
    kept, _ = rglru(**inputs)
    leaves = list(inputs.values())
    once = torch.autograd.grad(kept.sum(), leaves, retain_graph=True)
    twice = torch.autograd.grad(kept.sum(), leaves)
    recomputed = torch.autograd.grad(y.sum(), leaves)
    for first, second, third in zip(once, twice, recomputed, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_second_derivative_is_refused():
    inputs = make(4, 1, 2)
    (grad,) = torch.autograd.grad(rglru(**inputs)[0].square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_saves_four_activations():
    """x, the two gates and y are kept for the backward, nothing else that grows with T."""
    inputs = make(64, 2, 16, dtype=torch.bfloat16, state=True)
    starts = torch.zeros(64, 2, dtype=torch.bool)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        rglru(**inputs, starts=starts)
    activations = [tensor for tensor in saved if tensor.numel() == 64 * 2 * 16]
    assert [tensor.dtype for tensor in activations] == [torch.bfloat16] * 4
    assert sum(tensor.numel() for tensor in saved) == 4 * 64 * 2 * 16 + 64 * 2 + 2 * 16 + 16


def test_inputs_without_gradient():
    inputs = {k: v.detach() for k, v in make(9, 2, 3, state=True).items()}
    y, final = rglru(**inputs)
    assert not y.requires_grad
    assert not final.requires_grad
    inputs["decay"].requires_grad_()
    rglru(**inputs)[1].sum().backward()
    assert inputs["decay"].grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(4, 3)),
        ("x", torch.zeros(0, 2, 3)),
        ("x", torch.zeros(4, 2, 3, dtype=torch.int32)),
        ("input_gate", torch.zeros(4, 2, 1)),
        ("input_gate", torch.zeros(4, 2, 3, dtype=torch.bfloat16)),
        ("recurrence_gate", torch.zeros(2, 4, 3)),
        ("recurrence_gate", torch.zeros(4, 2, 3, device="meta")),
        ("decay", torch.zeros(1)),
        ("decay", torch.zeros(3, dtype=torch.int64)),
        ("starts", torch.zeros(2, 4, dtype=torch.bool)),
        ("starts", torch.zeros(4, 2, dtype=torch.int64)),
        ("initial_state", torch.zeros(3)),
        ("initial_state", torch.zeros(2, 3, device="meta")),
        ("backend", "cuda"),
    ],
)
def test_refuses(name, value):
    arguments = make(4, 2, 3, state=True) | {name: value}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        rglru(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpu():
    inputs = make(301, 3, 65, state=True)
    starts = torch.rand(301, 3, generator=torch.Generator().manual_seed(2)) < 0.02
    there = {name: leaf.detach().cuda().requires_grad_() for name, leaf in inputs.items()}
    y, final = rglru(**there, starts=starts.cuda())
    expected_y, expected_final = rglru(**as_float64(inputs), starts=starts, backend="reference")
    assert_close({"y": y.cpu(), "final": final.cpu()}, {"y": expected_y, "final": expected_final}, FLOAT32)
    grads = torch.autograd.grad(y.sum() + final.sum(), list(there.values()))
    wide = as_float64(inputs)
    expected_y, expected_final = rglru(**wide, starts=starts, backend="reference")
    expected = torch.autograd.grad(expected_y.sum() + expected_final.sum(), list(wide.values()))
    found = {name: grad.cpu() for name, grad in zip(LEAVES, grads, strict=True)}
    assert_close(found, dict(zip(LEAVES, expected, strict=True)), FLOAT32)

"""RG-LRU against the float64 reference, on split sequences and separate documents, and against transformers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from griffin.kernels.linear_scan import cpu as scan_cpu
from griffin.kernels.linear_scan.cpu import Tiling
from griffin.kernels.rglru import rglru, rglru_step
from tests.kernels.interpreter import BACKENDS, BACKENDS_TRITON_SLOW, needs_interpreter
from tests.kernels.rglru_inputs import (
    FLOAT32,
    LEAVES,
    SEQUENCES,
    Leaves,
    as_float64,
    assert_close,
    decay_terms,
    make,
    run,
)

pytestmark = pytest.mark.usefixtures("poisoned")

FLOAT64 = 1e-11  # the same algebra in another order in float64
STEPS = {"cpu": 300, "triton": 45}  # Triton's interpreter takes 10 ms a step


def compare_with_reference(
    inputs: Leaves, *, starts: set[int] | None, batch_first: bool, tolerance: float = FLOAT32, **options: Any
) -> None:
    """Compare results and gradients with the float64 reference; `starts` are indices into the flattened flags."""
    if batch_first:
        inputs |= {
            name: inputs[name].detach().transpose(0, 1).contiguous().requires_grad_()
            for name in SEQUENCES
            if inputs[name] is not None
        }
    flags = None
    if starts is not None:
        flags = torch.zeros(inputs["x"].shape[:2], dtype=torch.bool)
        flags.view(-1)[[place % flags.numel() for place in starts]] = True
    found = run(inputs, starts=flags, batch_first=batch_first, **options)
    wide = as_float64(inputs)
    expected = run(wide, starts=flags, batch_first=batch_first, backend="reference")
    # Single numbers that may all but cancel are compared with the size of their terms.
    scales = {"decay": decay_terms(wide, expected), "initial_state": torch.ones(1)}
    if inputs["branch"] is None:
        scales["final"] = expected["y"]
    assert_close(found, expected, tolerance, scales=scales)


SHAPES: dict[str, Any] = {
    "starts": st.one_of(st.none(), st.sets(st.integers(0, 209), max_size=20)),
    "state": st.booleans(),
    "branch": st.booleans(),
    "save_states": st.booleans(),
    "batch_first": st.booleans(),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=60)
@given(
    steps=st.integers(1, 70),
    batch=st.integers(1, 3),
    width=st.integers(1, 9),
    tile=st.integers(1, 500),
    step=st.integers(1, 100),
    **SHAPES,
)
def test_any_shape_tiling_and_starts(steps, batch, width, tile, step, state, branch, seed, **options):
    inputs = make(steps, batch, width, seed=seed, state=state, branch=branch)
    with mock.patch.multiple(scan_cpu, TILE_ELEMENTS=tile, STEP_ELEMENTS=step):
        compare_with_reference(inputs, backend="cpu", **options)


def triton_shape(steps, batch, width, chunk, state, branch, seed, **options):
    inputs = make(steps, batch, width, seed=seed, state=state, branch=branch)
    compare_with_reference(inputs, backend="triton", chunk=chunk, **options)


TRITON_SHAPES = given(
    # Up to five rounds of loads and what is left over, in up to five chunks.
    steps=st.integers(1, 42),
    batch=st.integers(1, 2),
    width=st.one_of(st.integers(1, 3), st.sampled_from([64, 65, 130])),
    chunk=st.sampled_from([0, 8, 16]),
    **SHAPES,
)
test_any_shape_on_triton = needs_interpreter(settings(max_examples=4)(TRITON_SHAPES(triton_shape)))
test_many_shapes_on_triton = needs_interpreter(pytest.mark.slow(settings(max_examples=80)(TRITON_SHAPES(triton_shape))))


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
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # 1 / (1 + inf) is 0
@BACKENDS_TRITON_SLOW
def test_extreme_decays(backend, decay_range, gate_scale):
    """For a near 1, 1 - a^2 is accurate, and the derivative of its root is bounded."""
    steps = STEPS[backend]
    inputs = make(steps, 2, 33, decay_range=decay_range, gate_scale=gate_scale, state=True, branch=True)
    starts = torch.zeros(steps, 2, dtype=torch.bool)
    starts[steps // 4] = True
    found = run(inputs, starts=starts, backend=backend, chunk=steps // 3)
    assert all(value.isfinite().all() for value in found.values())
    # Gradients that pass the bound are 1000 times others': their sums over time cancel in float32.
    assert_close(found, run(as_float64(inputs), starts=starts, backend="reference"), 5e-5)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_interpreter), "reference"])
def test_bounded_derivative(backend):
    """One channel with a = 1 - 1e-9: dy/dlog a = x m' a state-free step, with m' at most 1000 * 2 a^2."""
    decay = torch.full((1,), -19.0, dtype=torch.float64).requires_grad_()
    x = torch.ones(1, 1, 1, dtype=torch.float32 if backend == "triton" else torch.float64)
    gate = torch.zeros_like(x)
    expected = 0.5 * 2000 * 8 * 0.5 * decay.detach().sigmoid()  # i x, m', and d(-log a) = 8 r softplus'
    starts = torch.zeros(1, 1, dtype=torch.bool)
    y, _ = rglru(x, gate, gate, decay, starts=starts, backend=backend)
    (grad,) = torch.autograd.grad(y, decay)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0.0)  # a^2 is 1 to 1e-8


@BACKENDS
def test_first_token_of_a_document_forgets_exactly(backend):
    inputs = make(5, 1, 3, state=True)
    starts = torch.tensor([[False], [False], [True], [False], [False]])
    y, _ = rglru(**inputs, starts=starts, backend=backend)
    expected = inputs["input_gate"][2].sigmoid() * inputs["x"][2]
    # a = 0 and m = 1 exactly, so bitwise, but for Triton's own sigmoid
    torch.testing.assert_close(y[2], expected, rtol=0.0 if backend == "cpu" else 1e-6, atol=0.0)
    grads = torch.autograd.grad(y[2:].sum(), [inputs[name] for name in ("x", "initial_state")])
    assert grads[0][:2].count_nonzero() == 0
    assert grads[1].count_nonzero() == 0


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_interpreter), "reference"])
def test_position_0_without_starts(backend):
    """One document, which starts at position 0 if and only if there is no initial state."""
    inputs = make(4, 2, 3)
    first = torch.zeros(4, 2, dtype=torch.bool)
    first[0] = True
    assert_close(run(inputs, backend=backend), run(inputs, starts=first, backend=backend), 0.0)
    going_on = inputs | {"initial_state": torch.zeros(2, 3)}
    y, final = rglru(**inputs, starts=torch.zeros_like(first), backend=backend)
    same_y, same_final = rglru(**going_on, backend=backend)
    assert torch.equal(y, same_y)
    assert torch.equal(final, same_final)
    assert not torch.equal(y[0], rglru(**inputs, backend=backend)[0][0])


@BACKENDS_TRITON_SLOW
def test_strides_change_nothing(backend):
    """Gates that are halves of a tensor, and permuted x, give bitwise the result of contiguous tensors."""
    inputs = make(20, 3, 7, state=True, branch=True)
    options = {"backend": backend, "chunk": 8}
    expected = run(inputs, **options)
    both = torch.cat([inputs["input_gate"], inputs["recurrence_gate"]], -1).detach()
    strided = {
        "x": inputs["x"].detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_(),
        "input_gate": both[..., :7].detach().requires_grad_(),
        "recurrence_gate": both[..., 7:].detach().requires_grad_(),
        "decay": inputs["decay"].detach().repeat_interleave(2)[::2].requires_grad_(),
        "branch": inputs["branch"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        "initial_state": inputs["initial_state"].detach().t().contiguous().t().requires_grad_(),
        "gate_bias": inputs["gate_bias"].detach().t().contiguous().t().requires_grad_(),
    }
    assert not any(leaf.is_contiguous() for leaf in strided.values())
    assert_close(run(strided, **options), expected, 0.0)

    y, _ = rglru(**inputs, **options)
    (spread,) = torch.autograd.grad(y.sum(), inputs["x"])  # the gradient of a sum has no strides
    (dense,) = torch.autograd.grad(rglru(**inputs, **options)[0], inputs["x"], torch.ones_like(y))
    assert torch.equal(spread, dense)
    batch_major = {n: inputs[n].transpose(0, 1).contiguous() if n in SEQUENCES else inputs[n] for n in LEAVES}
    y_batch_major, _ = rglru(**batch_major, batch_first=True, **options)
    assert torch.equal(y_batch_major, y.transpose(0, 1))
    assert y_batch_major.is_contiguous()


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("branch", [False, True], ids=["", "branch"])
@BACKENDS_TRITON_SLOW
def test_half_precision(backend, branch, dtype, epsilon):
    """y and each gradient are rounded once, and the backward reads the rounded y as the state."""
    steps = STEPS[backend]
    inputs = make(steps, 2, 33, dtype=dtype, state=True, branch=branch)
    starts = torch.zeros(steps, 2, dtype=torch.bool)
    starts[[0, steps // 3, steps // 3 + 1]] = True
    found = run(inputs, starts=starts, backend=backend, chunk=steps // 3)
    expected = run(as_float64(inputs), starts=starts, backend="reference")
    assert {name: value.dtype for name, value in found.items()} == {
        "y": dtype,
        "final": torch.float32,
        **{name: leaf.dtype for name, leaf in inputs.items() if leaf is not None},
    }
    assert_close(found, expected, 2 * epsilon)
    # No state is rounded on the way to the last one.
    assert_close({"final": found["final"]}, {"final": expected["final"]}, FLOAT32)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    # 1 - a^2 is far above the bound.
    inputs = make(7, 2, 3, dtype=torch.float64, decay_range=(-3.0, 0.0), state=True, branch=True)
    starts = torch.zeros(7, 2, dtype=torch.bool)
    starts[3, 0] = starts[4, 1] = True

    def call(*leaves):
        return rglru(**dict(zip(LEAVES, leaves, strict=True)), starts=starts, backend=backend)

    with mock.patch.multiple(scan_cpu, TILE_ELEMENTS=24, STEP_ELEMENTS=12):  # two tiles of two chunks
        assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("result", [0, 1])
@BACKENDS
def test_gradient_of_one_result_only(backend, result):
    inputs = make(20, 2, 5, state=True, branch=True)
    grads = []
    for leaves, options in ((inputs, {"backend": backend, "chunk": 8}), (as_float64(inputs), {"backend": "reference"})):
        output = rglru(**leaves, **options)[result]
        found = torch.autograd.grad(
            output.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        grads.append(dict(zip(LEAVES, found, strict=True)))
    assert_close(*grads, FLOAT32)


@BACKENDS
def test_a_sequence_in_two_parts_equals_one(backend):
    inputs = make(40, 2, 5, state=True, branch=True)
    starts = torch.zeros(40, 2, dtype=torch.bool)
    starts[[10, 30], [0, 1]] = True
    cut = 17
    sequences = {name: inputs[name] for name in SEQUENCES}

    def in_parts():
        state, parts = inputs["initial_state"], []
        for part in (slice(None, cut), slice(cut, None)):
            pieces = {name: tensor[part] for name, tensor in sequences.items()}
            options = {"starts": starts[part], "initial_state": state, "backend": backend}
            options["gate_bias"] = inputs["gate_bias"]
            y, state = rglru(**pieces, decay=inputs["decay"], **options)
            parts.append(y)
        return torch.cat(parts), state

    results = {}
    for name, (y, state) in (("parts", in_parts()), ("whole", rglru(**inputs, starts=starts, backend=backend))):
        grads = torch.autograd.grad(y.square().sum() + state.sum(), list(inputs.values()))
        results[name] = {"y": y, "final": state, **dict(zip(LEAVES, grads, strict=True))}
    assert_close(results["parts"], results["whole"], FLOAT32)


@BACKENDS_TRITON_SLOW
def test_starts_at_every_place_around_a_chunk(backend):
    """One sequence for each place of a start before, at and after the first step of a chunk and of a round."""
    steps = 18
    inputs = make(steps, steps, 2, state=True, branch=True)
    starts = torch.eye(steps, dtype=torch.bool)
    found = run(inputs, starts=starts, backend=backend, chunk=8)
    assert_close(found, run(as_float64(inputs), starts=starts, backend="reference"), FLOAT32)


@BACKENDS
def test_packed_documents_equal_separate_documents(backend):
    lengths = (1, 2, 3, 20, 1, 9)
    inputs = make(sum(lengths), 2, 5)
    del inputs["initial_state"], inputs["branch"], inputs["gate_bias"]
    starts = torch.zeros(sum(lengths), 2, dtype=torch.bool)
    starts[[sum(lengths[:i]) for i in range(len(lengths))]] = True
    packed, last = rglru(**inputs, starts=starts, backend=backend, chunk=8)
    pieces = zip(*(inputs[name].split(lengths) for name in SEQUENCES[:3]), strict=True)
    apart = [rglru(*piece, inputs["decay"], backend=backend) for piece in pieces]
    y = torch.cat([document for document, _ in apart])
    results = []
    for output, final in ((packed, last), (y, apart[-1][1])):
        grads = torch.autograd.grad(output.square().sum() + final.sum(), list(inputs.values()))
        results.append({"y": output, "final": final, **dict(zip(inputs, grads, strict=True))})
    assert_close(*results, FLOAT32)


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


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_steps(backend: str, dtype: torch.dtype) -> None:
    """Single steps from a state equal the whole sequence; the state is kept in float32 between them."""
    inputs = {name: leaf.detach() for name, leaf in make(20, 3, 80, dtype=dtype, state=True, branch=True).items()}
    inputs["gate_bias"] = None  # in a step, gates include it
    y, last = rglru(**inputs)
    step = rglru_step(inputs["decay"], backend)
    state = inputs["initial_state"].t().contiguous()
    rows = [inputs[name].mT for name in ("x", "input_gate", "recurrence_gate", "branch")]
    found = torch.stack([step(x, i, r, branch, state) for x, i, r, branch in zip(*rows, strict=True)]).mT
    # y is rounded once; where float32 sums differ in their last bit, it may be to the neighbour.
    assert found.dtype == dtype
    torch.testing.assert_close(found, y, rtol=0 if dtype == torch.float32 else 2**-7, atol=FLOAT32)
    torch.testing.assert_close(state.t(), last, rtol=0, atol=FLOAT32)

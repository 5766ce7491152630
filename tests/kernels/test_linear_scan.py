"""The linear scan against the float64 reference, and the launch plans of its Triton programs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin.kernels.linear_scan import cpu, linear_scan, ops
from griffin.kernels.recurrence.plan import UNROLL, select_plan
from tests.kernels.interpreter import BACKENDS, needs_interpreter

pytestmark = pytest.mark.usefixtures("poisoned")

LEAVES = ("a", "b", "initial_state")
FLOAT32 = 1e-5  # sums of some ten float32 terms against float64; the largest error seen is 5e-7


def make(steps: int, batch: int, width: int, *, seed: int = 0, dtype=torch.float32, state: bool = False):
    """Return random inputs with a between -1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(steps, batch, width, generator=generator, dtype=torch.float64) * 2 - 1
    b = torch.randn(steps, batch, width, generator=generator, dtype=torch.float64)
    values = [a.to(dtype), b.to(dtype)]
    if state:
        initial = torch.randn(batch, width, generator=generator, dtype=torch.float64)
        values.append(initial if dtype == torch.float64 else initial.float())
    return {name: value.requires_grad_() for name, value in zip(LEAVES, values, strict=False)}


def run(inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    h, last = linear_scan(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (h, last)]
    # A single step that starts a document has no use for a.
    leaves = list(inputs.values())
    found = torch.autograd.grad((h, last), leaves, grads, allow_unused=True, materialize_grads=True)
    return {"h": h.detach(), "last": last.detach(), **dict(zip(inputs, found, strict=True))}


def oracle(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.items()}
    return run(wide, **options, backend="reference")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor's largest error relative to its largest value, or to 1 if that is larger."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = (value.double() - expected[name].double()).abs().max() / expected[name].abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


@needs_interpreter
@settings(max_examples=4)
@given(
    steps=st.integers(1, 42),
    batch=st.integers(1, 2),
    width=st.one_of(st.integers(1, 3), st.just(65)),
    chunk=st.sampled_from([0, 8, 16]),
    tile=st.integers(1, 500),
    starts=st.one_of(st.none(), st.sets(st.integers(0, 83), max_size=12)),
    state=st.booleans(),
    batch_first=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_starts(steps, batch, width, chunk, tile, starts, state, batch_first, seed):
    inputs = make(steps, batch, width, seed=seed, state=state)
    if batch_first:
        inputs |= {n: inputs[n].detach().transpose(0, 1).contiguous().requires_grad_() for n in LEAVES[:2]}
    flags = None
    if starts is not None:
        flags = torch.zeros(inputs["b"].shape[:2], dtype=torch.bool)
        flags.view(-1)[[place % flags.numel() for place in starts]] = True
    options = {"starts": flags, "batch_first": batch_first}
    expected = oracle(inputs, **options)
    assert_close(run(inputs, backend="triton", chunk=chunk, **options), expected, FLOAT32)
    with mock.patch.multiple(cpu, TILE_ELEMENTS=tile, STEP_ELEMENTS=tile // 3 + 1):
        assert_close(run(inputs, backend="cpu", **options), expected, FLOAT32)


@needs_interpreter
def test_more_chunks_than_are_chained_at_a_time():
    from griffin.kernels.recurrence import scan

    inputs = make(75, 2, 3, state=True)

    with mock.patch.object(scan, "CARRIES_CHUNKS", 4):
        found = run(inputs, backend="triton", chunk=8)  # ten chunks
    assert_close(found, oracle(inputs), FLOAT32)


@BACKENDS
def test_a_at_starts_is_ignored(backend):
    inputs = make(12, 2, 3, state=True)
    starts = torch.zeros(12, 2, dtype=torch.bool)
    starts[[0, 5], [0, 1]] = True
    expected = run(inputs, starts=starts, backend=backend)
    with torch.no_grad():
        inputs["a"][starts] = float("inf")
    found = run(inputs, starts=starts, backend=backend)
    assert_close(found, expected, 0.0)
    assert found["a"][starts].count_nonzero() == 0


@BACKENDS
def test_half_precision(backend):
    """h and each gradient are rounded once, and the backward reads the rounded h."""
    inputs = make(40, 2, 5, dtype=torch.bfloat16, state=True)
    found = run(inputs, backend=backend, chunk=16)
    assert {name: value.dtype for name, value in found.items()} == {
        "h": torch.bfloat16,
        "last": torch.float32,
        "a": torch.bfloat16,
        "b": torch.bfloat16,
        "initial_state": torch.float32,
    }
    expected = oracle(inputs)
    assert_close(found, expected, 2 * 2**-8)
    assert_close({"last": found["last"]}, {"last": expected["last"]}, FLOAT32)  # no state is rounded on the way


@BACKENDS
def test_is_deterministic(backend):
    inputs = make(30, 2, 5, state=True)
    assert_close(run(inputs, backend=backend, chunk=8), run(inputs, backend=backend, chunk=8), 0.0)


def test_gradcheck():
    inputs = make(7, 2, 3, dtype=torch.float64, state=True)
    starts = torch.zeros(7, 2, dtype=torch.bool)
    starts[3, 0] = starts[4, 1] = True
    with mock.patch.multiple(cpu, TILE_ELEMENTS=24, STEP_ELEMENTS=12):  # two tiles of two chunks
        assert torch.autograd.gradcheck(
            lambda *leaves: linear_scan(**dict(zip(LEAVES, leaves, strict=True)), starts=starts), tuple(inputs.values())
        )


@BACKENDS
def test_opcheck(backend):
    inputs = make(9, 2, 3, state=True)
    starts = torch.arange(18).view(9, 2) % 7 == 3
    apart = inputs["b"].detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()  # channels apart
    arguments = (inputs["a"], apart, starts, inputs["initial_state"], 8, backend)
    torch.library.opcheck(
        ops.forward, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b", torch.zeros(4, 3)),
        ("b", torch.zeros(4, 2, 3, dtype=torch.int32)),
        ("a", torch.zeros(4, 2, 1)),
        ("a", torch.zeros(4, 2, 3, dtype=torch.bfloat16)),
        ("starts", torch.zeros(2, 4, dtype=torch.bool)),
        ("initial_state", torch.zeros(3)),
        ("backend", "cuda"),
        ("chunk", -1),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        linear_scan(**(make(4, 2, 3) | {name: value}))


@pytest.mark.parametrize("steps", [1, 100, 2048, 8192, 32768])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("width", [1, 512, 1024, 2048, 4096, 8192])
def test_plans(steps, batch, width):
    plan = select_plan(steps, batch, width, 132)
    assert plan.chunk * (plan.chunks - 1) < steps <= plan.chunk * plan.chunks, "every step, and no empty chunk"
    if plan.chunks > 1:
        assert plan.chunk % UNROLL == 0
        assert "chunks of" in plan.reason
    else:
        assert plan.reason.startswith("sequential: ")
    if batch * width >= 32768:
        assert plan.chunks == 1, "wide shapes read their inputs once"
    elif steps >= 2048:
        assert plan.chunks > 1, "narrow shapes occupy the device by chunks"


def test_plans_with_a_given_chunk():
    assert select_plan(100, 1, 64, 132, 0).chunks == 1
    assert select_plan(100, 8, 8192, 132, 9).chunk == 16
    assert select_plan(100, 1, 64, 132, 1000).chunks == 1

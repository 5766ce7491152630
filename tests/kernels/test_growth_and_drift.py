"""Recurrences whose products over hundreds of steps overflow, or whose factors near 1 accumulate rounding errors."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin.kernels.linear_scan import cpu, linear_scan
from griffin.kernels.linear_scan.cpu import Tiling
from griffin.kernels.rglru import rglru
from tests.kernels.interpreter import needs_interpreter

LONG = 16384
ROUNDING = 2.0**-24  # of float32


def results(a: Tensor, b: Tensor, starts: Tensor | None, backend: str) -> list[Tensor]:
    """Return h, the last state, and the gradients of a and b for gradients of one, whose errors do not cancel."""
    leaves = [a.detach().requires_grad_(), b.detach().requires_grad_()]
    h, last = linear_scan(*leaves, starts=starts, backend=backend)
    grads = torch.autograd.grad((h, last), leaves, (torch.ones_like(h), torch.ones_like(last)))
    return [h.detach(), last.detach(), *grads]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Return the largest errors relative to the largest values."""
    return [
        ((one.double() - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()
        for one, other in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("start", [None, 150, 190, 7000])
def test_products_that_overflow(reverse: bool, start: int | None) -> None:
    """a = 3 for 200 steps, through which only zeros flow, forward or backward."""
    a = torch.full((LONG, 1, 8), 0.5)
    steps = slice(-201, -1) if reverse else slice(200)
    a[steps] = 3.0
    state = torch.zeros(LONG, 1, 8)
    starts = None
    if start is not None:
        starts = torch.zeros(LONG, 1, dtype=torch.bool)
        starts[[0, LONG - 1 - start if reverse else start]] = True
    tiling = Tiling.of(state)
    assert tiling.chunks > 1
    assert 3.0**tiling.chunk > torch.finfo(torch.float32).max
    leaves = [a.requires_grad_(), state.requires_grad_()]
    h, last = linear_scan(*leaves, starts=starts)
    grads = torch.autograd.grad((h, last), leaves, (torch.zeros_like(h), torch.zeros_like(last)))
    for found in (h, last, *grads):
        assert found.count_nonzero() == 0  # NaN counts as nonzero


@needs_interpreter
@pytest.mark.parametrize("steps", [slice(8, 16), slice(0, 24), slice(20, 36)])
def test_products_that_overflow_on_triton(steps: slice) -> None:
    """Products of 1e10 over chunks of 8 steps exceed float32's range; only zeros flow through them."""
    a, state = torch.full((42, 1, 3), 0.5), torch.zeros(42, 1, 3)
    a[steps] = 1e10
    leaves = [a.requires_grad_(), state.requires_grad_()]
    h, last = linear_scan(*leaves, backend="triton", chunk=8)
    grads = torch.autograd.grad((h, last), leaves, (torch.zeros_like(h), torch.zeros_like(last)))
    for found in (h, last, *grads):
        assert found.count_nonzero() == 0


@needs_interpreter
@pytest.mark.slow
def test_decays_near_1_do_not_drift_on_triton() -> None:
    """With float32 products the error over 2000 steps in chunks of 248 would be 1e-5."""
    steps = 2000
    a, b = torch.full((steps, 1, 1), 0.99999), torch.ones(steps, 1, 1)
    decay = a[0, 0, 0].double()
    expected = (1 - decay ** torch.arange(1, steps + 1)) / (1 - decay)
    h, last = linear_scan(a, b, backend="triton", chunk=248)
    assert max(errors([h[:, 0, 0], last[0, 0]], [expected, expected[-1]])) < 20 * ROUNDING


@pytest.mark.parametrize("reverse", [False, True])
def test_growth_that_cancels(reverse: bool) -> None:
    """h = 3 h - 2 stays 1, although a chunk from a zero state ends at -3^L."""
    a, b = torch.full((300, 1, 2), 3.0), torch.full((300, 1, 2), -2.0)
    if reverse:  # a_t (g_t + carry) = 3 (-2/3 + 1)
        h, last = linear_scan(a, b.zero_().requires_grad_(), initial_state=torch.zeros(1, 2))
        grads = (torch.full_like(h, -2.0), torch.full_like(last, 3.0))
        (found,) = torch.autograd.grad((h, last), b, grads)  # dL/dh_t = g_t + 3 dL/dh_t+1 = 1
    else:
        found, _ = linear_scan(a, b, initial_state=torch.ones(1, 2))
    assert torch.equal(found, torch.ones_like(found))


@settings(max_examples=40)
@given(
    steps=st.integers(2, 90),
    magnitudes=st.lists(st.sampled_from([0.0, 1e-3, 0.5, 0.99999, 1.0, 1.01, 3.0, 1e3]), min_size=1, max_size=90),
    sizes=st.lists(st.sampled_from([0.0, 1e-3, 1.0]), min_size=1, max_size=5),
    starts=st.one_of(st.none(), st.sets(st.integers(0, 89), max_size=6)),
    seed=st.integers(0, 2**31),
)
def test_finite_and_close_wherever_the_loop_is(steps, magnitudes, sizes, starts, seed):
    """Each step is within a few roundings of the largest state so far, as amplified by the products."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, steps, 1, 2), generator=generator) * 2.0 - 1
    a = torch.tensor([magnitudes[t % len(magnitudes)] for t in range(steps)])[:, None, None] * signs[0]
    b = torch.tensor([sizes[t % len(sizes)] for t in range(steps)])[:, None, None] * signs[1]
    flags = None
    if starts is not None:
        flags = torch.zeros(steps, 1, dtype=torch.bool)
        flags[[place % steps for place in starts]] = True
    loop = results(a, b, flags, "reference")
    exact = results(a.double(), b.double(), flags, "reference")
    # Rounding errors grow as in the recurrence of absolute values.
    bound = results(a.double().abs(), b.double().abs(), flags, "reference")
    with mock.patch.multiple(cpu, TILE_ELEMENTS=60, STEP_ELEMENTS=12):  # tiles of several chunks
        found = results(a, b, flags, "cpu")
    for value, plain, wide, size in zip(found, loop, exact, bound, strict=True):
        finite = plain.isfinite()
        assert value.isfinite()[finite].all()
        error, underflow = ((one.double() - wide).abs()[finite] for one in (value, plain))
        assert (error <= ROUNDING * 4 * steps * size[finite] + 2 * underflow).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 64)])
def test_decays_near_1_do_not_drift(shape: tuple[int, int]) -> None:
    """At most 100 roundings of the largest value; products rounded in one direction would cause 4e-4 of it."""
    a, b = torch.full((LONG, *shape), 0.99999), torch.ones(LONG, *shape)
    # Closed form of the loop in float64, with the float32 number nearest to .99999.
    decay = a[0, 0, 0].double()
    powers = decay ** torch.arange(1, LONG + 1)
    h = (1 - powers) / (1 - decay)
    found = results(a, b, None, "cpu")
    # Of b: the steps from it on, and the last state once more.
    backward = (1 - powers) / (1 - decay) + powers / decay
    expected = [h, h[-1], backward.flip(0)]
    picked = [found[0][:, 0, 0], found[1][0, 0], found[3][:, 0, 0]]
    assert max(errors(picked, expected)) < 100 * ROUNDING


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 64)])
def test_rglru_near_1_is_closer_than_the_rounded_decay(shape: tuple[int, int]) -> None:
    """log a = -6.6e-6: a is rounded by up to 0.5 % of that, which chunks must not accumulate."""
    x, gate = torch.ones(LONG, *shape), torch.full((LONG, *shape), -5.0)
    decay = torch.full(shape[1:], -9.0)
    y, last = rglru(x, gate, gate, decay, backend="cpu")
    wide = [tensor.double() for tensor in (gate[0, 0, 0], gate[0, 0, 0], decay[0])]
    i, r, p = wide
    i, r = i.sigmoid(), r.sigmoid()
    log_a = -8 * r * torch.nn.functional.softplus(p)
    time = torch.arange(LONG)
    # h_0 = i x, then m i x more at each step.
    sums = torch.expm1(time * log_a) / torch.expm1(log_a)
    expected = i * ((time * log_a).exp() + (-torch.expm1(2 * log_a)).sqrt() * sums)
    assert max(errors([y[:, 0, 0], last[0, 0]], [expected, expected[-1]])) < 5e-6

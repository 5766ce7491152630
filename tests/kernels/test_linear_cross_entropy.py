"""The loss without all logits against PyTorch's cross-entropy in float64, whole and in shards of the vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from griffin.kernels.linear_cross_entropy import blocks, cpu, linear_cross_entropy, ops, tiles
from griffin.kernels.linear_cross_entropy.terms import MOST_TOKENS, chunk_tokens, tile_rows
from griffin.kernels.products import add_product
from tests.kernels.interpreter import BACKENDS, BACKENDS_TRITON_SLOW, needs_interpreter

pytestmark = pytest.mark.usefixtures("poisoned")

LEAVES = ("hidden", "table")
FLOAT32 = 1e-5  # sums of at most some hundred float32 terms; 2e-6 was seen
FLOAT64 = 1e-12  # the same algebra in another order
Inputs = dict[str, Any]


def make(
    tokens: int = 11,
    width: int = 6,
    rows: int = 40,
    *,
    valid: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    valid = rows if valid is None else valid
    assert valid > 0
    weights = torch.rand(tokens, generator=generator)
    weights[torch.rand(tokens, generator=generator) < 0.3] = 0
    return {
        "hidden": (scale * random(tokens, width)).to(dtype).requires_grad_(),
        "table": random(rows, width).to(dtype).requires_grad_(),
        "labels": torch.randint(valid, (tokens,), generator=generator),
        "weights": weights,
        "valid": valid,
    }


def results(total: Tensor, losses: Tensor, inputs: Inputs, factor: float = 2.0) -> dict[str, Tensor]:
    """Both results, and the gradients of `factor` times the sum."""
    found = torch.autograd.grad(factor * total, [inputs[name] for name in LEAVES])
    return {"total": total.detach(), "losses": losses, **dict(zip(LEAVES, found, strict=True))}


def run(inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    return results(*linear_cross_entropy(**inputs, **options), inputs)


def wide(inputs: Inputs) -> Inputs:
    return inputs | {name: inputs[name].detach().double().requires_grad_() for name in LEAVES}


def oracle(inputs: Inputs, soft_cap: float = 0.0, z_loss: float = 0.0) -> dict[str, Tensor]:
    inputs = wide(inputs)
    logits = inputs["hidden"] @ inputs["table"][: inputs["valid"]].t()
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    losses = F.cross_entropy(logits, inputs["labels"], reduction="none")
    total = (inputs["weights"] * (losses + z_loss * logits.logsumexp(1) ** 2)).sum()
    return results(total, losses.detach(), inputs)


def errors(found: dict[str, Tensor], expected: dict[str, Tensor], inputs: Inputs | None = None) -> dict[str, float]:
    """Largest error of each tensor relative to its largest value; with `inputs`, to its largest term if this is larger.

    Gradients are sums of (probability - 1) * term, where a single row of the table leaves rounding only.
    """
    assert found.keys() == expected.keys()
    terms = {}
    if inputs is not None:
        terms = {"hidden": inputs["table"], "table": inputs["hidden"]}
    measured = {}
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        if value.numel():
            largest = expected[name].abs().max().clamp(min=1e-30)
            if inputs is not None and name in terms and inputs["weights"].any():
                largest = largest.clamp(min=(inputs["weights"].max() * terms[name].detach().abs().max()).item())
            measured[name] = ((value.double() - expected[name].double()).abs().max() / largest).item()
    return measured


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, inputs: Inputs | None = None
) -> None:
    for name, error in errors(found, expected, inputs).items():
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


SCHEDULES = pytest.mark.parametrize("schedule", [{"chunk": 4}, {"tile": 7}], ids=str)  # tokens, or rows of the table
CAPS, Z_LOSSES = st.sampled_from([0.0, 2.0]), st.sampled_from([0.0, 0.1])


SCHEDULE = st.one_of(
    st.just({}),
    st.builds(lambda tokens: {"chunk": tokens}, st.integers(1, 21)),
    st.builds(lambda rows: {"tile": rows}, st.integers(1, 90)),
)


@example(tokens=0, width=1, rows=1, padding=0, schedule={}, elements=1, soft_cap=0.0, z_loss=0.0, seed=0)
@example(tokens=0, width=1, rows=3, padding=0, schedule={"tile": 2}, elements=1, soft_cap=0.0, z_loss=0.0, seed=0)
@settings(max_examples=40)
@given(
    tokens=st.integers(0, 20),
    width=st.integers(1, 9),
    rows=st.integers(1, 70),
    padding=st.integers(0, 10),
    schedule=SCHEDULE,
    elements=st.integers(1, 200),
    soft_cap=CAPS,
    z_loss=Z_LOSSES,
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_schedule(tokens, width, rows, padding, schedule, elements, soft_cap, z_loss, seed):
    inputs = make(tokens, width, rows + padding, valid=rows, seed=seed)
    small = {(cpu, "TILE_ELEMENTS"): elements, (blocks, "BLOCK_ELEMENTS"): elements, (tiles, "MOST_TOKENS"): 8}
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in small.items():
            patch.setattr(module, name, value)
        found = run(inputs, soft_cap=soft_cap, z_loss=z_loss, **schedule, backend="cpu")
    assert_close(found, oracle(inputs, soft_cap, z_loss), FLOAT32, inputs)
    assert not found["table"][rows:].any(), "padding has no gradient"


def triton_shape(tokens, width, rows, padding, schedule, soft_cap, z_loss, seed):
    inputs = make(tokens, width, rows + padding, valid=rows, seed=seed)
    found = run(inputs, soft_cap=soft_cap, z_loss=z_loss, **schedule, backend="triton")
    assert_close(found, oracle(inputs, soft_cap, z_loss), FLOAT32, inputs)
    assert not found["table"][rows:].any()


TRITON_SHAPES = given(
    tokens=st.integers(1, 6),
    width=st.integers(1, 9),
    rows=st.sampled_from([1, 130, 2048, 4096, 4099, 9000]),  # up to three blocks of columns
    padding=st.sampled_from([0, 1, 128]),
    schedule=st.sampled_from([{}, {"chunk": 1}, {"chunk": 4}, {"tile": 4099}]),
    soft_cap=CAPS,
    z_loss=Z_LOSSES,
    seed=st.integers(0, 2**31),
)
test_any_shape_on_triton = needs_interpreter(settings(max_examples=4)(TRITON_SHAPES(triton_shape)))
test_many_shapes_on_triton = needs_interpreter(
    pytest.mark.slow(settings(max_examples=100)(TRITON_SHAPES(triton_shape)))
)


@BACKENDS_TRITON_SLOW
@pytest.mark.parametrize(("soft_cap", "schedule"), [(0.0, "chunk"), (2.0, "chunk"), (2.0, "tile")])
def test_shards_together_are_the_whole(backend, soft_cap, schedule):
    """Each label lies in one of the shards; the last one holds padding only."""
    inputs = make(tokens=23, rows=40, valid=26)
    expected = run(inputs, soft_cap=soft_cap, z_loss=0.1, backend=backend)
    shards, step = inputs["table"].detach().split(10), 5 if schedule == "chunk" else 23
    assert {int(label) // 10 for label in inputs["labels"]} == {0, 1, 2}
    parts = []
    for rank, shard in enumerate(shards):
        begins = iter(range(0, 23, step))

        def gather(found: Tensor, rank: int = rank, begins: Any = begins) -> Tensor:
            chunk = slice(begin := next(begins), begin + step)
            every = [
                ops.statistics_(
                    inputs["hidden"].detach()[chunk] @ rows.t(), inputs["labels"][chunk], soft_cap,
                    10 * place, min(max(26 - 10 * place, 0), 10), backend,
                )
                for place, rows in enumerate(shards)
            ]  # fmt: skip
            torch.testing.assert_close(found, every[rank])
            return torch.stack(every)

        local = inputs | {
            "table": shard.clone().requires_grad_(),
            "valid": min(max(26 - 10 * rank, 0), 10),
            "hidden": inputs["hidden"].detach().requires_grad_(),
        }
        options = {"soft_cap": soft_cap, "z_loss": 0.1, schedule: 5 if schedule == "chunk" else 4, "backend": backend}
        parts.append(run(local, first=10 * rank, gather=gather, **options))
        assert next(begins, None) is None, "one exchange a chunk, or with tiles one"
    together = {
        "hidden": sum(part["hidden"] for part in parts),
        "table": torch.cat([part["table"] for part in parts]),
    }
    for part in parts:
        assert_close(part | together, expected, FLOAT32)


HALF = [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)]


@pytest.mark.parametrize(("dtype", "epsilon"), HALF)
@BACKENDS
def test_half_precision(backend, dtype, epsilon):
    """Logits and their gradient are rounded once, and sums are float32: no error is above that of plain PyTorch."""
    inputs = make(tokens=70, width=32, rows=300, valid=290, dtype=dtype, scale=0.3)
    expected = oracle(inputs)
    found = run(inputs, chunk=20, backend=backend)
    assert [found[name].dtype for name in LEAVES] == [dtype, dtype]
    logits = (inputs["hidden"] @ inputs["table"].t()).float()[:, :290]
    losses = F.cross_entropy(logits, inputs["labels"], reduction="none")
    plain = errors(results((inputs["weights"] * losses).sum(), losses.detach(), inputs), expected)
    for name, error in errors(found, expected).items():
        # Triton's interpreter cuts digits off where a GPU rounds.
        allowed = max(plain[name], epsilon / 4) * (2.5 if backend == "triton" else 1.1)
        assert error <= allowed, f"{name}: {error:.1e}, plain PyTorch {plain[name]:.1e}"


@BACKENDS
def test_precision_of_small_losses_beside_large_logits(backend):
    """log-sum-exp and target are close to 1000: their difference must not be one of such numbers."""
    hidden, table = torch.tensor([[1000.0]]), torch.tensor([[1.0], [0.99]])
    _, losses = linear_cross_entropy(hidden, table, torch.tensor([0]), backend=backend)
    # The distance of float32 numbers near 1000 is 6e-5, and near the sum of exponentials, 1, it is 1e-7.
    assert losses.item() == pytest.approx(math.log1p(math.exp(-10)), abs=2e-7)


@BACKENDS
def test_extremes(backend):
    """Logits of 1e4 give finite losses and gradients; a cap that they exceed by far gives none at all."""
    inputs = make(scale=3e3)
    assert_close(run(inputs, backend=backend), oracle(inputs), FLOAT32)
    found = run(inputs, soft_cap=1.0, backend=backend)
    assert_close({"losses": found["losses"]}, {"losses": oracle(inputs, 1.0)["losses"]}, FLOAT32)
    assert all(value.isfinite().all() for value in found.values())


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(backend, value):
    inputs = make(tokens=4, width=1)
    with torch.no_grad():
        inputs["hidden"][2] = value
    inputs["weights"][:] = 1
    found = run(inputs, backend=backend)
    assert found["total"].isnan()
    assert found["losses"].isnan().tolist() == [False, False, True, False]
    assert found["table"].isnan().any()


@BACKENDS
def test_labels_of_weight_zero_may_be_any(backend):
    inputs = make()
    inputs["weights"][[0, 4]] = 0
    expected = run(inputs, backend=backend)
    inputs["labels"][[0, 4]] = torch.tensor([-100, 10**9])
    found = run(inputs, backend=backend)
    found["losses"][[0, 4]] = expected["losses"][[0, 4]]
    assert_close(found, expected, 0.0)


@BACKENDS
def test_shapes_and_strides_change_nothing(backend):
    inputs = make(tokens=12)
    expected = run(inputs, backend=backend)
    hidden = inputs["hidden"].detach()
    strided = {
        "hidden": hidden.view(4, 3, -1).permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_(),
        "table": inputs["table"].detach().t().contiguous().t().requires_grad_(),
        "labels": inputs["labels"].view(4, 3).t().contiguous().t(),
        "weights": inputs["weights"].view(4, 3).repeat_interleave(2, 1)[:, ::2],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    found = run(inputs | strided, backend=backend)
    assert found["losses"].shape == (4, 3)
    flat = {"losses": found["losses"].flatten(), "hidden": found["hidden"].reshape(12, -1)}
    assert_close(found | flat, expected, FLOAT32)  # other kernels of the products
    without = {name: value for name, value in inputs.items() if name != "weights"}
    ones = inputs | {"weights": torch.ones(12)}
    assert_close(run(without, backend=backend), run(ones, backend=backend), 0.0)


@BACKENDS
@SCHEDULES
def test_repeats_bitwise(backend, schedule):
    first, second = (run(make(), soft_cap=2.0, **schedule, backend=backend) for _ in range(2))
    assert_close(first, second, 0.0)


@SCHEDULES
def test_gradcheck(schedule):
    inputs = make(tokens=5, rows=9, valid=7, dtype=torch.float64)

    def total(hidden: Tensor, table: Tensor) -> Tensor:
        leaves = {"hidden": hidden, "table": table}
        return linear_cross_entropy(**inputs | leaves, soft_cap=2.0, z_loss=0.1, **schedule)[0]

    assert torch.autograd.gradcheck(total, tuple(inputs[name] for name in LEAVES))


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_reference(soft_cap):
    inputs = make(valid=33)
    found = run(wide(inputs), soft_cap=soft_cap, z_loss=0.1, backend="reference")
    assert_close(found, oracle(inputs, soft_cap, 0.1), FLOAT64)
    assert_close(run(wide(inputs), soft_cap=soft_cap, z_loss=0.1), oracle(inputs, soft_cap, 0.1), FLOAT64)


def test_only_what_is_asked_for_is_computed():
    inputs = make()
    flops = 2 * 11 * 6 * 40  # of a product

    def counted(**given: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            total, _ = linear_cross_entropy(**inputs | given)
            if total.requires_grad:
                total.backward()
        return counter.get_total_flops()

    assert counted() == 3 * flops
    assert counted(hidden=inputs["hidden"].detach()) == 2 * flops
    assert counted(table=inputs["table"].detach()) == 2 * flops
    assert counted(**{name: inputs[name].detach() for name in LEAVES}) == flops
    with torch.no_grad():
        assert counted() == flops
    assert counted(tile=7) == 4 * flops, "logits twice"
    assert counted(tile=7, hidden=inputs["hidden"].detach()) == 3 * flops


@SCHEDULES
def test_the_table_gradient_is_added_to_main_grad(schedule):
    inputs = make(dtype=torch.bfloat16)
    expected = oracle(inputs)["table"]
    main_grad, returned = torch.ones(40, 6), torch.full((40, 6), 3.0).bfloat16()
    total, _ = linear_cross_entropy(**inputs, **schedule, main_grad=main_grad, added=lambda: returned)
    assert (main_grad == 1).all(), "the sum's gradient is not known yet"
    (2 * total).backward()
    assert torch.equal(inputs["table"].grad, returned)
    assert_close({"table": main_grad - 1}, {"table": expected}, 2**-7)


@SCHEDULES
def test_backward_again(schedule):
    """With the graph kept, the gradient is the same; one of the gradient is refused."""
    inputs = make()
    total, losses = linear_cross_entropy(**inputs, **schedule)
    assert not losses.requires_grad
    leaves = [inputs[name] for name in LEAVES]
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    factor = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(factor * total, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@given(rows=st.integers(1, 2**24), dtype=st.sampled_from([torch.bfloat16, torch.float32]), on_cpu=st.booleans())
def test_a_chunk_has_at_most_256_megabytes_of_logits(rows, dtype, on_cpu):
    tokens = chunk_tokens(rows, dtype, on_cpu=on_cpu)
    row = rows * (4 if on_cpu else dtype.itemsize)
    assert 1 <= tokens * row <= 2**28
    if tokens < (192 if on_cpu else 2**28):
        assert (tokens + 64) * (row + 64 * 4) > 2**28, "more would fit, and products of few tokens are slow"


@given(tokens=st.integers(1, 2**18), rows=st.integers(1, 2**20), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_a_tile_has_at_most_256_megabytes_of_logits(tokens, rows, dtype):
    tile = tile_rows(tokens, rows, dtype)
    assert 1 <= tile <= rows
    assert min(tokens, MOST_TOKENS) * tile * dtype.itemsize <= 2**28


@BACKENDS
def test_operators_are_what_they_claim(backend):
    """Fake implementations and mutation, as torch.library.opcheck sees them; they have no gradient."""
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))[:, :50].bfloat16()
    labels, rows = torch.arange(5), torch.rand(3, 5)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(ops.statistics_, (logits, labels, 2.0, 1, 45, backend), test_utils=tests)
    torch.library.opcheck(ops.gradient_, (logits, labels, *rows, 2.0, 1, 45, backend, True), test_utils=tests)
    few = ("test_schema", "test_faketensor")
    torch.library.opcheck(add_product, (torch.zeros(50, 3), torch.ones(5, 50), torch.ones(5, 3)), test_utils=few)


@needs_interpreter
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_padded_rows_of_logits(soft_cap):
    """Columns beyond those of a shard, and what lies between rows, are neither read nor written."""
    buffer = torch.full((3, 200), math.nan)
    buffer[:, :130] = torch.randn(3, 130, generator=torch.Generator().manual_seed(0))
    labels, (scales, weights) = torch.tensor([3, 150, 129]), torch.rand(2, 3)
    found = {}
    for backend in ("cpu", "triton"):
        logits = buffer.clone()
        part = logits[:, :140]
        statistics = ops.statistics_(part, labels, soft_cap, 1, 130, backend)
        ops.gradient_(part, labels, statistics[0] + 1, scales, weights, soft_cap, 1, 130, backend, False)
        assert not part[:, 130:].any()
        assert logits[:, 140:].isnan().all()
        found[backend] = {"statistics": statistics, "gradient": part}
    assert_close(found["triton"], found["cpu"], FLOAT32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", torch.zeros(11, 6, dtype=torch.int32)),
        ("table", torch.zeros(40)),
        ("table", torch.zeros(0, 6)),
        ("table", torch.zeros(40, 5)),
        ("table", torch.zeros(40, 6, dtype=torch.bfloat16)),
        ("labels", torch.zeros(11, 1, dtype=torch.int64)),
        ("labels", torch.zeros(11, dtype=torch.int32)),
        ("weights", torch.zeros(10)),
        ("weights", torch.zeros(11, dtype=torch.int64)),
        ("valid", 41),
        ("valid", -1),
        ("soft_cap", -1.0),
        ("z_loss", math.nan),
        ("chunk", 0),
        ("tile", 0),
        ("main_grad", torch.zeros(40, 6, dtype=torch.bfloat16)),
        ("backend", "cuda"),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        linear_cross_entropy(**(make() | {name: value}))


def test_the_reference_knows_no_shards():
    with pytest.raises(ValueError, match=r"^backend: 'reference'"):
        linear_cross_entropy(**make(), first=3, backend="reference")


@needs_interpreter
def test_equals_liger():
    """Liger's fused loss, by its programs: sums over tokens, without soft cap, z-loss and shards."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    inputs = make(tokens=20, width=32, rows=300)
    total, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        inputs["hidden"], inputs["table"], inputs["labels"], None, None, -100, 0.0, 0.0, "sum"
    )
    expected = results(total, torch.empty(0), inputs)
    del inputs["weights"]
    for schedule in ({"chunk": 7}, {"tile": 128}):
        found = run(inputs, backend="triton", **schedule) | {"losses": torch.empty(0)}
        assert_close(found, expected, FLOAT32)

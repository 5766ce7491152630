"""Triton programs on a GPU at real sizes, against PyTorch operations in float64 on the same GPU."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from griffin.kernels.backends import ATTENTION_BACKENDS
from griffin.kernels.conv1d import causal_conv1d
from griffin.kernels.gated_gelu import gated_gelu
from griffin.kernels.linear_cross_entropy import linear_cross_entropy
from griffin.kernels.linear_scan import linear_scan
from griffin.kernels.local_attention import attention_mask, multi_query_attention, resolve_backend
from griffin.kernels.local_attention.flex import flex_attention_mqa, flex_mask
from griffin.kernels.local_attention.reference import multi_query_attention_reference
from griffin.kernels.local_attention.selection import is_reproducible
from griffin.kernels.products import add_product
from griffin.kernels.recurrent_block import recurrent_block
from griffin.kernels.rglru import rglru
from griffin.kernels.rms_norm import add_rms_norm, rms_norm
from griffin.kernels.rotary import rotary_cos_sin, rotary_qkv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Sequential, chunked, and widths that are no multiple of a program's 64 channels or of 16.
SHAPES = [(2048, 8, 4096), (8192, 1, 1024), (5001, 2, 2560), (3000, 3, 1001), (1, 4, 512)]
# Relative to each tensor's largest value. In half precision, rounding of results; in float32, channels have a memory of
# about a thousand steps, over which errors in the last bits of a decay accumulate.
DTYPES = {torch.float32: 1e-3, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def make_starts(steps: int, batch: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(9)
    return torch.rand(steps, batch, generator=generator, device="cuda") < 0.002


def operation(name: str, steps: int, batch: int, width: int, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """Return an operation as a function of the backend and its differentiable arguments, and these arguments."""
    starts = make_starts(steps, batch)
    if name in TOKEN_OPERATIONS:
        return token_operation(name, steps, batch, width, dtype)
    if name == "recurrent_block":
        blocks = next(n for n in (16, 13, 11, 7) if width % n == 0)
        leaves = {
            "xy": random(steps, batch, 2 * width, seed=1, dtype=dtype),
            "conv_weight": random(4, width, seed=2, scale=0.5),
            "conv_bias": random(width, seed=3),
            "gate_weight": random(blocks, width // blocks, 2 * width // blocks, seed=4, dtype=dtype, scale=0.05),
            "gate_bias": random(2, width, seed=5),
            "xy_bias": random(2 * width, seed=6),
            "decay": torch.linspace(-9, -2, width, device="cuda"),
        }
        return lambda backend, **arguments: recurrent_block(**arguments, starts=starts, backend=backend), leaves
    if name == "conv1d":
        leaves = {
            "x": random(steps, batch, width, seed=1, dtype=dtype),
            "weight": random(4, width, seed=2),
            "bias": random(width, seed=3),
            "initial_window": random(3, batch, width, seed=4, dtype=dtype),
        }
        return lambda backend, **arguments: (causal_conv1d(**arguments, starts=starts, backend=backend),), leaves
    state = random(batch, width, seed=8)
    if name == "linear_scan":
        a = torch.rand(steps, batch, width, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        leaves = {"a": a.to(dtype), "b": random(steps, batch, width, seed=2, dtype=dtype), "initial_state": state}
        return lambda backend, **arguments: linear_scan(**arguments, starts=starts, backend=backend), leaves
    wide = random(steps, batch, 2 * width, seed=5, dtype=dtype)  # a branch and x that are halves of one tensor
    leaves = {
        "x": wide[..., :width],
        "branch": wide[..., width:],
        "input_gate": random(steps, batch, width, seed=6, dtype=dtype, scale=2.0),
        "recurrence_gate": random(steps, batch, width, seed=7, dtype=dtype, scale=2.0),
        "decay": torch.linspace(-9, -2, width, device="cuda"),
        "initial_state": state,
        "bias": random(3, width, seed=10),
    }
    if name == "rglru":
        del leaves["branch"], leaves["bias"]
    return lambda backend, **arguments: rglru(**arguments, starts=starts, backend=backend), leaves


TOKEN_OPERATIONS = ("gated_gelu", "rms_norm", "add_rms_norm", "rotary")


def token_operation(name: str, steps: int, batch: int, width: int, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """Return an operation on tokens, as `operation`."""
    x = random(steps, batch, width, seed=1, dtype=dtype)
    if name == "gated_gelu":
        leaves = {"x": random(steps, batch, 2 * width, seed=1, dtype=dtype), "bias": random(2 * width, seed=2)}
        return lambda backend, **arguments: (gated_gelu(**arguments, backend=backend),), leaves
    if name == "rms_norm":
        leaves = {"x": x, "weight": random(width, seed=2)}
        return lambda backend, **arguments: (rms_norm(**arguments, backend=backend),), leaves
    if name == "add_rms_norm":
        leaves = {"x": x, "branch": random(steps, batch, width, seed=3, dtype=dtype), "weight": random(width, seed=2)}
        leaves["bias"] = random(width, seed=4)
        return lambda backend, **arguments: add_rms_norm(**arguments, backend=backend), leaves
    head_dim = 128 if width % 2 == 0 else 12
    heads = max(1, width // head_dim)
    angles = rotary_cos_sin(torch.arange(steps, device="cuda")[:, None].expand(-1, batch), head_dim)
    leaves = {"qkv": random(steps, batch, (heads + 2) * head_dim, seed=1, dtype=dtype)}
    return lambda backend, **arguments: rotary_qkv(**arguments, angles=angles, heads=heads, backend=backend), leaves


def run(function: Any, leaves: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    arguments = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    results = function(backend, **arguments)
    grads = [random(*result.shape, seed=20 + i).to(result.dtype) for i, result in enumerate(results)]
    found = torch.autograd.grad(results, list(arguments.values()), grads)
    return {f"result {i}": r.detach() for i, r in enumerate(results)} | dict(zip(arguments, found, strict=True))


@pytest.mark.parametrize(
    "name", ["rglru", "rglru with branch", "linear_scan", "conv1d", "recurrent_block", *TOKEN_OPERATIONS]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("steps", "batch", "width"), SHAPES)
def test_equals_float64_and_is_deterministic(name: str, dtype: torch.dtype, steps: int, batch: int, width: int) -> None:
    function, leaves = operation(name, steps, batch, width, dtype)
    found = run(function, leaves, "triton")
    again = run(function, leaves, "triton")
    for key, value in found.items():
        assert torch.equal(value, again[key]), f"{key}: two runs differ"
    del again
    wide = {key: leaf.double() for key, leaf in leaves.items()}
    expected = run(function, wide, "cpu")
    for key, value in found.items():
        largest = expected[key].abs().max()
        if any(word in key for word in ("decay", "weight", "bias")):  # sums over T and B of terms of both signs
            largest = largest.clamp(min=(steps * batch) ** 0.5)
        error = ((value.double() - expected[key]).abs().max() / largest).item()
        assert error <= DTYPES[dtype], f"{key}: {error:.1e}"


@pytest.mark.parametrize("chunk", [0, 4096])
def test_more_than_2_31_elements(chunk: int) -> None:
    """Checks the last channels of the last sequence, whose offsets need 64 bits."""
    steps, batch, width = 65_664, 4, 8192
    assert steps * batch * width > 2**31
    needed = 12 * steps * batch * width * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    shape = (steps, batch, width)
    tensors = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3))
    decay = torch.linspace(-9, -2, width, device="cuda")
    x, input_gate, recurrence_gate = arguments = [tensor.requires_grad_() for tensor in tensors]
    y, last = rglru(x, input_gate, recurrence_gate, decay, chunk=chunk)
    grads = torch.autograd.grad(y, arguments, x.detach())
    part = [tensor.detach()[:, -1:, -32:].double().requires_grad_() for tensor in arguments]
    expected, expected_last = rglru(part[0], part[1], part[2], decay[-32:].double(), backend="cpu")
    expected_grads = torch.autograd.grad(expected, part, part[0].detach())
    for found, wide in zip((y, last[None], *grads), (expected, expected_last[None], *expected_grads), strict=True):
        error = (found[:, -1:, -32:].double() - wide).abs().max() / wide.abs().max()
        assert error <= 2**-7
    weight, bias = random(4, width, seed=1), random(width, seed=2)
    convolved = causal_conv1d(x.detach(), weight, bias)[:, -1:, -32:]
    expected = causal_conv1d(part[0].detach(), weight[:, -32:].double(), bias[-32:].double(), backend="cpu")
    assert (convolved.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize("batch_first", [False, True])
def test_new_lengths_do_not_recompile(batch_first: bool) -> None:
    """A program compiled for one length serves all lengths: calls take milliseconds, compiling takes seconds."""
    decay = torch.linspace(-9, -2, 1024, device="cuda")
    weight, bias = random(4, 1024, seed=1), random(1024, seed=2)

    def call(steps: int) -> float:
        shape = (2, steps, 1024) if batch_first else (steps, 2, 1024)
        x, gate = (random(*shape, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in (1, 2))
        torch.cuda.synchronize()
        begun = time.perf_counter()
        starts = make_starts(*shape[:2])
        convolved = causal_conv1d(x, weight, bias, starts=starts, batch_first=batch_first)
        y, _ = rglru(convolved, gate, gate, decay, branch=x, starts=starts, batch_first=batch_first)
        torch.autograd.grad(y.sum(), (x, gate))
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    call(2048)  # compiles
    usual = min(call(2048) for _ in range(5))
    for steps in (2049, 2063, 3333, 4095, 1500):
        assert call(steps) < 0.25 + 4 * usual, steps


# Tokens, width, rows of the table, those that are not padding. The last has more tokens than a tile of the table takes.
LOSS_SHAPES = [(2048, 512, 8192, 8192), (777, 1000, 5001, 4900), (16_500, 64, 640, 640)]
# Chunks of tokens, the last of them shorter; tiles of the table, likewise; both chosen by size.
SCHEDULES: dict[str, dict[str, Any]] = {"chunks": {"chunk": 600}, "tiles": {"tile": 1024}, "chosen": {}}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("in_buffer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rows", "valid"), LOSS_SHAPES)
def test_loss_equals_float64(
    dtype: torch.dtype, tokens: int, width: int, rows: int, valid: int, schedule: str, in_buffer: bool
) -> None:
    """With soft cap, z-loss, tokens of weight 0, and the table's gradient in a buffer that holds another one."""
    hidden = random(tokens, width, seed=1, dtype=dtype)
    table = random(rows, width, seed=2, dtype=dtype, scale=width**-0.5)
    labels = torch.randint(valid, (tokens,), generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    weights = (random(tokens, seed=4) > -1).float()

    def results(wide: bool) -> dict[str, Tensor]:
        leaves = [(leaf.double() if wide else leaf).detach().requires_grad_() for leaf in (hidden, table)]
        total = leaves[1].new_ones(rows, width, dtype=torch.float64 if wide else torch.float32) if in_buffer else None
        loss, losses = linear_cross_entropy(
            leaves[0],
            leaves[1],
            labels,
            weights,
            soft_cap=20.0,
            z_loss=1e-2,
            valid=valid,
            main_grad=total,
            **({"backend": "cpu"} if wide else {"backend": "triton"} | SCHEDULES[schedule]),
        )
        grads = torch.autograd.grad(2 * loss, leaves, allow_unused=True)
        assert (grads[1] is None) == in_buffer
        found = {"loss": loss, "losses": losses, "hidden": grads[0], "table": grads[1] if total is None else total - 1}
        return {name: value.detach() for name, value in found.items()}

    found, expected = results(wide=False), results(wide=True)
    assert not found["table"][valid:].any()
    for name, value in found.items():
        error = ((value.double() - expected[name]).abs().max() / expected[name].abs().max()).item()
        assert error <= DTYPES[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("are_rows_apart", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rows", "width"), [(4096, 1024, 512), (1001, 77, 130)])
def test_add_product_equals_float64(
    dtype: torch.dtype, tokens: int, rows: int, width: int, are_rows_apart: bool, overwrite: bool
) -> None:
    """Into float32, by Apex where it is installed and rows adjoin, else by PyTorch. A part of a fused gradient."""
    wide = random(tokens, 2 * rows, seed=1, dtype=dtype)
    a = wide[:, rows:] if are_rows_apart else wide[:, rows:].contiguous()
    b, total = random(tokens, width, seed=2, dtype=dtype), random(rows, width, seed=3, scale=100.0)
    if overwrite:
        expected = a.double().t() @ b.double()
        total.fill_(float("nan"))  # is not read
    else:
        expected = total.double() + a.double().t() @ b.double()
    add_product(total, a, b, overwrite=overwrite)
    assert total.dtype == torch.float32
    # Products of half precision are exact in float32, so that only sums round; float32 may be multiplied as TF32.
    tolerance = 2**-9 if dtype == torch.float32 else 1e-5
    assert ((total.double() - expected).abs().max() / expected.abs().max()).item() <= tolerance


# Batch, query heads, length, window and head dim. The first is a rank of griffin-14b with tensor 4; heads of 256 are
# those of RecurrentGemma; the others have odd sizes.
ATTENTION_SHAPES = [(4, 10, 2048, 1024, 128), (2, 10, 2048, 2048, 256), (1, 40, 2048, None, 128), (3, 5, 777, 100, 64)]
# Relative to each tensor's largest value: rounding of weights and results; TF32 products in float32.
ATTENTION_DTYPES = {torch.float32: 4 * 2**-11, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}


def attention_inputs(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k and v, the halves of one tensor, and documents [B, T] by id."""
    batch, heads, length, _, head_dim = shape
    q = random(length, batch, heads, head_dim, seed=1, dtype=dtype)
    k, v = random(length, batch, 2 * head_dim, seed=2, dtype=dtype).split(head_dim, -1)
    return [q, k, v], make_starts(length, batch).t().cumsum(1)


def attention_results(attend: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    attended = attend(*leaves)
    found = torch.autograd.grad(attended, leaves, random(*attended.shape, seed=3).to(attended.dtype))
    return dict(zip(("attended", "q", "k", "v"), (attended.detach(), *found), strict=True))


def compare_attention(found: dict[str, Tensor], inputs: list[Tensor], documents: Tensor, window: int | None) -> None:
    """With the float64 reference, one sequence at a time: it holds all scores."""
    for row in range(len(documents)):
        q, k, v = leaves = [tensor[:, row : row + 1].double().requires_grad_() for tensor in inputs]
        gradient = random(*found["attended"].shape, seed=3).to(inputs[0].dtype)[:, row : row + 1].double()
        attended = multi_query_attention_reference(q, k, v, documents[row : row + 1], window)
        grads = torch.autograd.grad(attended, leaves, gradient)
        for (name, value), right in zip(found.items(), (attended, *grads), strict=True):
            error = ((value[:, row : row + 1].double() - right).abs().max() / right.abs().max()).item()
            assert error <= ATTENTION_DTYPES[inputs[0].dtype], f"{name} of sequence {row}: {error:.1e}"


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize("dtype", ATTENTION_DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_attention(shape: tuple[Any, ...], dtype: torch.dtype, backend: str) -> None:
    window, head_dim = shape[3:]
    try:
        resolve_backend(backend, torch.device("cuda", 0), dtype, head_dim)
    except ValueError as error:
        pytest.skip(str(error))
    inputs, documents = attention_inputs(shape, dtype)
    mask = attention_mask(documents, window, backend=backend)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return multi_query_attention(q, k, v, mask)

    found = attention_results(attend, inputs)
    compare_attention(found, inputs, documents, window)
    if is_reproducible(backend, head_dim) and backend != "sdpa":
        again = attention_results(attend, inputs)
        assert all(torch.equal(value, again[name]) for name, value in found.items()), "two runs differ"


@pytest.mark.parametrize("groups", [1, 2, 5, 10])
def test_flex_attention_with_repeated_keys(groups: int) -> None:
    shape = ATTENTION_SHAPES[0]
    inputs, documents = attention_inputs(shape, torch.bfloat16)
    mask = flex_mask(documents, shape[3])
    found = attention_results(lambda q, k, v: flex_attention_mqa(q, k, v, mask, groups), inputs)
    compare_attention(found, inputs, documents, shape[3])

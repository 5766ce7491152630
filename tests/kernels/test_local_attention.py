"""Attention against a dense float64 reference, on separate documents, and against transformers."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from griffin.kernels.local_attention import attention_mask, multi_query_attention
from griffin.kernels.local_attention.reference import multi_query_attention_reference
from griffin.kernels.rotary import apply_rotary, rotary_cos_sin

FLOAT32 = 1e-5  # dot products and softmax sums of at most some hundred float32 terms; the largest error seen is 1e-6
FLOAT64 = 1e-12  # the same algebra in another order


def make(length: int, batch: int, heads: int, head_dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (length, batch, heads, head_dim), "k": (length, batch, head_dim), "v": (length, batch, head_dim)}
    drawn = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in drawn.items()}


def one_document(length: int, batch: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.int64)


def gradients(y: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return y and the gradient of each input, for a random gradient of y."""
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    found = torch.autograd.grad(y, list(inputs.values()), grad)
    return {"y": y.detach(), **dict(zip(inputs, found, strict=True))}


def oracle(inputs: dict[str, Tensor], documents: Tensor, window: int | None) -> dict[str, Tensor]:
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.items()}
    return gradients(multi_query_attention_reference(**wide, documents=documents, window=window), wide)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor's largest error relative to its largest value."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = expected[name].abs().max().clamp(min=1.0)  # a query that sees one key has no gradient but roundoff
        error = (value.double() - expected[name].double()).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


@st.composite
def packed(draw):
    """Draw length, window and documents [B, T] of packed sequences."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 50))
    window = draw(st.one_of(st.none(), st.integers(1, 60)))
    starts = torch.zeros(batch, length, dtype=torch.int64)
    for place in draw(st.sets(st.integers(0, batch * length - 1), max_size=12)):
        starts.view(-1)[place] = 1
    return length, window, starts.cumsum(1)


@settings(max_examples=60)
@given(packed(), st.integers(1, 4), st.sampled_from((1, 4, 7, 16)), st.integers(0, 2**31))
def test_any_shape_window_and_documents(sequences, heads, head_dim, seed):
    length, window, documents = sequences
    inputs = make(length, len(documents), heads, head_dim, seed=seed)
    found = gradients(multi_query_attention(**inputs, mask=attention_mask(documents, window)), inputs)
    assert_close(found, oracle(inputs, documents, window), FLOAT32)


@pytest.mark.parametrize("window", [None, 1, 16, 40, 500])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_mask_equals_blocked_mask(window):
    """Compared by FlexAttention's forward, as it has no backward on CPUs."""
    documents = torch.tensor([[0] * 5 + [1] * 90 + [2] * 78, [3] * 173])
    inputs = {name: tensor.detach() for name, tensor in make(173, 2, 3, 16).items()}
    expected = multi_query_attention_reference(**inputs, documents=documents, window=window)
    for backend in ("flex", "sdpa"):
        found = multi_query_attention(**inputs, mask=attention_mask(documents, window, backend=backend))
        assert_close({"y": found}, {"y": expected}, FLOAT32)


def test_flex_mask_skips_blocks_outside_the_window():
    """Of 16 x 16 blocks of 128 scores, a window of 256 needs 3 per row of blocks, and fewer in the first two rows."""
    mask = attention_mask(one_document(2048, 1), 256, backend="flex").blocks
    blocks = mask.kv_num_blocks
    if mask.full_kv_num_blocks is not None:
        blocks = blocks + mask.full_kv_num_blocks
    assert blocks.flatten().tolist() == [1, 2] + [3] * 14


class _Scores(TorchDispatchMode):
    """Counts the scores that fused attention computes, and records the largest tensor that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = 0
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert "scaled_dot_product_attention_math" not in name, "unfused attention: it writes the scores"
        if "scaled_dot_product" in name and "backward" not in name:
            query, key = args[:2]
            self.scores += query.shape[:-1].numel() * key.shape[-2]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_cost_grows_with_length_times_window():
    window, batch, heads, head_dim = 32, 2, 3, 8
    for length in (32, 128, 512, 1024):
        inputs = make(length, batch, heads, head_dim)
        with _Scores() as counted:
            mask = attention_mask(one_document(length, batch), window)
            multi_query_attention(**inputs, mask=mask).sum().backward()
        # Every query meets its own block of keys and, but in the first block, the one before.
        assert counted.scores == batch * heads * window * (2 * length - window)
        # No tensor is larger than q or one block's mask, forward and backward.
        assert counted.largest <= max(inputs["q"].numel(), batch * window * 2 * window)


def test_window_agrees_with_transformers():
    """A query sees W keys including its own."""
    masking = pytest.importorskip("transformers.masking_utils")
    length, window = 12, 5
    theirs = masking.sliding_window_causal_mask_function(window)
    time = torch.arange(length)
    expected = torch.stack([torch.stack([theirs(0, 0, query, key) for key in time]) for query in time])
    assert expected.sum(1).tolist() == [1, 2, 3, 4] + [5] * 8
    # With zero scores, attention over one-hot values spreads evenly over the keys that are seen.
    zeros = torch.zeros(length, 1, length)
    mask = attention_mask(one_document(length, 1), window)
    weights = multi_query_attention(zeros.unsqueeze(2), zeros, torch.eye(length).unsqueeze(1), mask)
    assert torch.equal(weights[:, 0] > 0, expected)


@pytest.mark.parametrize("window", [None, 7])
def test_packed_documents_equal_separate_documents(window):
    lengths = (1, 2, 3, 20, 1, 9)
    inputs = make(sum(lengths), 2, 3, 8, dtype=torch.float64)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(1).expand(-1, 2)

    def attend(q, k, v, places, ids):
        angles = rotary_cos_sin(places, 8, torch.float64)
        q, k = apply_rotary(q, angles), apply_rotary(k.unsqueeze(2), angles).squeeze(2)
        return multi_query_attention(q, k, v, attention_mask(ids, window))

    pieces = zip(*(inputs[name].split(lengths) for name in "qkv"), positions.split(lengths), strict=True)
    apart = torch.cat([attend(*piece, one_document(len(piece[0]), 2)) for piece in pieces])
    together = attend(*inputs.values(), positions, documents)
    assert_close(gradients(together, inputs), gradients(apart, inputs), FLOAT64)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision(dtype, epsilon, window):
    """Scores and softmax are float32. Weights are rounded before the product with v, and results after it."""
    inputs = make(100, 2, 3, 16, dtype=dtype)
    documents = torch.tensor([[0] * 37 + [1] * 63, [2] * 100])
    found = gradients(multi_query_attention(**inputs, mask=attention_mask(documents, window)), inputs)
    assert all(value.dtype == dtype for value in found.values())
    assert_close(found, oracle(inputs, documents, window), 4 * epsilon)


def test_strided_heads():
    """Heads are slices of a wider projection, keys and values are halves of another."""
    inputs = make(30, 2, 3, 8)
    expected = multi_query_attention(**inputs, mask=attention_mask(one_document(30, 2), 10))
    q = torch.cat([inputs["q"].detach(), torch.randn(30, 2, 1, 8)], 2)[:, :, :3]
    k, v = torch.cat([inputs["k"], inputs["v"]], -1).detach().split(8, -1)
    found = multi_query_attention(q, k, v, attention_mask(one_document(30, 2), 10))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=FLOAT32)


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_mask_is_shared_by_tensors_without_gradient(backend):
    """One mask is used by any number of layers, without warnings (which would repeat at every step)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        mask = attention_mask(one_document(20, 2).int(), 6, backend=backend)
        for seed in (0, 1):
            inputs = {name: tensor.detach() for name, tensor in make(20, 2, 2, 16, seed=seed).items()}
            expected = multi_query_attention_reference(**inputs, documents=one_document(20, 2), window=6)
            assert_close({"y": multi_query_attention(**inputs, mask=mask)}, {"y": expected}, FLOAT32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(6, 2, 8)),
        ("k", torch.zeros(6, 2, 1, 8)),
        ("k", torch.zeros(6, 2, 4)),
        ("v", torch.zeros(5, 2, 8)),
        ("v", torch.zeros(6, 2, 8, dtype=torch.bfloat16)),
        ("v", torch.zeros(6, 2, 8, device="meta")),
        ("mask", attention_mask(torch.zeros(2, 7, dtype=torch.int64), 3)),
        ("mask", attention_mask(torch.zeros(1, 6, dtype=torch.int64), 3, backend="flex")),
    ],
)
def test_attention_refuses(name, value):
    arguments = {**make(6, 2, 3, 8), "mask": attention_mask(one_document(6, 2), 3)} | {name: value}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        multi_query_attention(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("documents", {"documents": torch.zeros(6, dtype=torch.int64)}),
        ("documents", {"documents": torch.zeros(2, 6)}),
        ("documents", {"documents": torch.zeros(2, 0, dtype=torch.int64)}),
        ("window", {"window": 0}),
        ("backend", {"backend": "flash"}),
    ],
)
def test_mask_refuses(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        attention_mask(**({"documents": one_document(6, 2), "window": 3} | arguments))

"""Attention by libraries that take packed documents: arguments, order of tokens, offsets, and the choice of a library.

The libraries run on GPUs only; functions with their arguments stand in for them here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen
from torch.utils._python_dispatch import TorchDispatchMode

from griffin.kernels.backends import ATTENTION_BACKENDS
from griffin.kernels.local_attention import attention_mask, document_offsets, multi_query_attention, resolve_backend
from griffin.kernels.local_attention.flash import flash_attention
from griffin.kernels.local_attention.packed import Attend, Offsets, PackedMask, offsets_of
from griffin.kernels.local_attention.reference import multi_query_attention_reference
from griffin.kernels.local_attention.selection import COUNTED, Library, Target, choose
from griffin.kernels.local_attention.varlen import library, varlen_attention

CPU = torch.device("cpu")
HEAD_DIM = 8
needs_varlen = pytest.mark.skipif(library() is None, reason="needs a PyTorch whose varlen_attn has windows")


def attend_documents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, left: int) -> Tensor:
    """Causal attention [tokens, H, hd] within each document over `left` earlier keys, all of them if it is -1."""
    assert cu_seqlens.dtype == torch.int32
    bounds = cu_seqlens.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(q))
    assert max_seqlen == max(end - begin for begin, end in itertools.pairwise(bounds))
    attended = []
    for begin, end in itertools.pairwise(bounds):
        if begin == end:
            continue
        pieces = [x[begin:end].unsqueeze(1) for x in (q, k, v)]
        one = torch.zeros(1, end - begin, dtype=torch.int64)
        window = None if left == -1 else left + 1
        found = multi_query_attention_reference(pieces[0], pieces[1][:, :, 0], pieces[2][:, :, 0], one, window)
        attended.append(found.view(end - begin, *q.shape[1:]))
    return torch.cat(attended)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    assert (scale, enable_gqa, window_size[1]) == (HEAD_DIM**-0.5, True, 0)
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k
    return attend_documents(query, key, value, cu_seq_q, max_q, window_size[0])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    deterministic: bool,
) -> tuple[Tensor, None]:
    assert (softmax_scale, causal, deterministic) == (HEAD_DIM**-0.5, True, True)
    assert window_size[1] == (-1 if window_size[0] == -1 else 0)
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k
    return attend_documents(q, k, v, cu_seqlens_q, max_seqlen_q, window_size[0]), None


LIBRARIES: dict[str, Attend] = {
    "flash": partial(flash_attention, function=flash_attn_varlen_func),
    "varlen": partial(varlen_attention, function=varlen_attn),
}


@st.composite
def packed(draw: st.DrawFn) -> tuple[Tensor, int | None]:
    """Draw documents [B, T] by id, and a window."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    starts = torch.zeros(batch, length, dtype=torch.int64)
    for place in draw(st.sets(st.integers(0, batch * length - 1), max_size=9)):
        starts.view(-1)[place] = 1
    return starts.cumsum(1), draw(st.one_of(st.none(), st.integers(1, 40)))


def leaves(documents: Tensor, heads: int, seed: int) -> list[Tensor]:
    """q, k and v; k and v are halves of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = documents.shape
    q = torch.randn(length, batch, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
    kv = torch.randn(length, batch, 2 * HEAD_DIM, generator=generator, dtype=torch.float64)
    return [tensor.detach().requires_grad_() for tensor in (q, *kv.split(HEAD_DIM, -1))]


def results(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    attended = attend(*inputs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(attended.shape, generator=generator, dtype=attended.dtype)
    return [attended.detach(), *torch.autograd.grad(attended, inputs, grad)]


@pytest.mark.parametrize("name", LIBRARIES)
@settings(max_examples=40)
@given(packed(), st.integers(1, 3), st.integers(0, 2**31))
def test_equals_the_reference(name: str, sequences: tuple[Tensor, int | None], heads: int, seed: int) -> None:
    documents, window = sequences
    batch, length = documents.shape
    mask = PackedMask((batch, length), offsets_of(documents), window, LIBRARIES[name])
    inputs = leaves(documents, heads, seed)
    found = results(partial(multi_query_attention, mask=mask), inputs)
    expected = results(partial(multi_query_attention_reference, documents=documents, window=window), inputs)
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("starts", "cu_seqlens", "max_seqlen"),
    [
        ([[1, 0, 0, 0]], [0, 4], 4),
        ([[0, 0, 0, 0]], [0, 4], 4),  # a sequence begins a document
        ([[1, 0, 0, 1], [0, 0, 1, 0]], [0, 3, 4, 6, 8], 3),
        ([[1, 1, 1, 0, 0]], [0, 1, 2, 5, 5], 3),  # 3 documents, and one without tokens
        ([[1, 1, 1, 1, 1, 0]], [0, 1, 2, 3, 4, 6, 6, 6, 6], 2),
    ],
)
def test_offsets(starts: list[list[int]], cu_seqlens: list[int], max_seqlen: int) -> None:
    given = torch.tensor(starts, dtype=torch.bool)
    found = document_offsets(given)
    assert (found.cu_seqlens.tolist(), found.cu_seqlens.dtype, found.max_seqlen) == (
        cu_seqlens,
        torch.int32,
        max_seqlen,
    )
    assert given.tolist() == torch.tensor(starts, dtype=torch.bool).tolist(), "the argument has changed"
    by_id = offsets_of(given.cumsum(1))
    assert (by_id.cu_seqlens.tolist(), by_id.max_seqlen) == (cu_seqlens, max_seqlen)


class _Modes(TorchDispatchMode):
    """Records whether PyTorch is in its deterministic mode in the backward of varlen_attn, and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[bool] = []
        self.products: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        mode = torch.are_deterministic_algorithms_enabled()
        if function.name().startswith("torch_attn::_varlen_attn_backward"):
            self.attention.append(mode)
        if function.name().startswith("aten::mul"):
            self.products.append(mode)
        return function(*args, **(kwargs or {}))


@needs_varlen
def test_varlen_s_backward_is_deterministic_and_nothing_else() -> None:
    """With PyTorch's own function, on meta tensors."""
    q, kv = (torch.randn(4, heads, HEAD_DIM, device="meta", requires_grad=True) for heads in (2, 1))
    offsets = Offsets(torch.empty(2, dtype=torch.int32, device="meta"), 4)
    attended = varlen_attention(2 * q, 2 * kv, 2 * kv, offsets, None)
    with _Modes() as modes:
        for _ in range(2):
            torch.autograd.grad(attended.sum(), (q, kv), retain_graph=True)
    assert modes.attention == [True, True]
    assert modes.products == [False] * 6
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("head_dim", "expected"), [(128, True), (192, True), (256, False)])
def test_flash_is_deterministic_where_it_can(head_dim: int, expected: bool) -> None:
    given = []

    def function(q: Tensor, *args: object, deterministic: bool, **kwargs: object) -> Tensor:
        given.append(deterministic)
        return q  # as newer versions, without the log-sum-exp

    q = torch.randn(4, 2, head_dim)
    offsets = Offsets(torch.tensor([0, 4], dtype=torch.int32), 4)
    assert flash_attention(q, q, q, offsets, None, function) is q
    assert given == [expected]


@needs_varlen
def test_only_a_version_of_varlen_attn_with_windows_and_grouped_heads_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    find = library.__wrapped__
    assert find() is torch_varlen.varlen_attn
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: query)
    assert find() is None


def on_gpu(
    capability: tuple[int, int] | None = (9, 0), *, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> Target:
    return Target(device=torch.device("cuda", 0), dtype=dtype, head_dim=head_dim, capability=capability)


ON_CPU = Target(device=CPU, dtype=torch.bfloat16, head_dim=128, capability=None)
BOTH: dict[str, Library | None] = {"flash": flash_attn_varlen_func, "varlen": varlen_attn}


@pytest.mark.parametrize(
    ("on", "absent", "expected"),
    [
        (on_gpu(), (), "flash"),
        (on_gpu(), ("flash",), "varlen"),
        (on_gpu(), ("flash", "varlen"), "flex"),
        (on_gpu(head_dim=256), (), "varlen"),  # FlashAttention 3 has no deterministic backward
        (on_gpu(head_dim=320), (), "flex"),
        (on_gpu(head_dim=100), (), "flex"),
        (on_gpu(dtype=torch.float32), (), "flex"),
        (on_gpu((8, 0)), (), "varlen"),
        (on_gpu((8, 0), head_dim=208), (), "varlen"),
        (on_gpu((8, 9), head_dim=208), (), "flex"),
        (on_gpu((8, 9), head_dim=256), (), "varlen"),
        (on_gpu((10, 0)), (), "varlen"),
        (on_gpu((7, 5)), (), "flex"),
        (on_gpu(None), (), "flex"),  # a GPU of AMD
        (ON_CPU, (), "sdpa"),
        (Target(device=torch.device("meta"), dtype=torch.float32, head_dim=1, capability=None), (), COUNTED),
    ],
)
def test_choice(on: Target, absent: tuple[str, ...], expected: str) -> None:
    assert choose("auto", on, {**BOTH, **dict.fromkeys(absent)}) == expected


@pytest.mark.parametrize(
    ("backend", "on", "absent", "message"),
    [
        ("flash", ON_CPU, (), "'flash' on cpu; accepted on NVIDIA GPUs of compute capability 9.0"),
        ("varlen", ON_CPU, (), "'varlen' on cpu; accepted on NVIDIA GPUs of compute capability 8.0 and above"),
        ("flex", ON_CPU, (), "'flex' on cpu; accepted on a GPU"),
        ("flash", on_gpu((8, 0)), (), "'flash' on cuda:0 of compute capability 8.0; accepted on NVIDIA GPUs of"),
        ("varlen", on_gpu((7, 5)), (), "'varlen' on cuda:0 of compute capability 7.5; accepted on NVIDIA GPUs of"),
        ("varlen", on_gpu(dtype=torch.float32), (), "'varlen' for torch.float32; accepted: bfloat16 and float16"),
        ("flash", on_gpu(head_dim=264), (), "'flash' for model.head_dim = 264; accepted: multiples of 8 up to 256"),
        ("varlen", on_gpu(head_dim=100), (), "'varlen' for model.head_dim = 100; accepted: multiples of 8 up to 256"),
        ("varlen", on_gpu((8, 6), head_dim=200), (), "'varlen' for model.head_dim = 200 on cuda:0 of compute cap"),
        ("flash", on_gpu(), ("flash",), "'flash' without the package flash_attn_interface (Fl"),
        ("varlen", on_gpu(), ("varlen",), f"'varlen' with torch {torch.__version__}; accepted where torch.nn"),
        ("fast", ON_CPU, (), "'fast'; accepted: 'auto', 'flash', 'varlen', 'flex', 'sdpa'"),
    ],
)
def test_refusals(backend: str, on: Target, absent: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match="^train.attention: " + re.escape(message)):
        choose(backend, on, {**BOTH, **dict.fromkeys(absent)}, "train.attention")


def test_heads_of_256_are_accepted_where_they_are_asked_for() -> None:
    assert choose("flash", on_gpu(head_dim=256), BOTH) == "flash"


def test_on_a_cpu() -> None:
    assert resolve_backend("auto", CPU, torch.bfloat16, 128) == "sdpa"
    documents = torch.zeros(1, 3, dtype=torch.int64)
    for backend in set(ATTENTION_BACKENDS) - {"sdpa"}:
        with pytest.raises(ValueError, match=f"^train.attention: '{backend}' on cpu; accepted on"):
            resolve_backend(backend, CPU, torch.bfloat16, 128, "train.attention")
    for backend in LIBRARIES:
        with pytest.raises(ValueError, match=f"^backend: '{backend}' on cpu; accepted on a GPU"):
            attention_mask(documents, None, backend=backend)

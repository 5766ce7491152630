"""RG-LRU as a custom operator: saved tensors, copies, errors, recomputation and torch.compile."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from griffin.kernels import selection
from griffin.kernels.rglru import ops, rglru
from tests.kernels.interpreter import BACKENDS, BACKENDS_TRITON_SLOW, needs_interpreter
from tests.kernels.rglru_inputs import LEAVES, assert_close, make, run

pytestmark = pytest.mark.usefixtures("poisoned")


@needs_interpreter
def test_tensors_with_contiguous_channels_are_not_copied():
    """Programs are passed the tensors themselves: time-major, batch-major, or halves of wider ones."""
    from griffin.kernels.recurrence.scan import ScanInputs

    wide = torch.randn(6, 2, 10)
    tensors = {"term": wide[..., :5], "gate": wide[..., 5:], "input_gate": torch.randn(2, 6, 5).transpose(0, 1)}
    inputs = ScanInputs.of(**tensors, rate=torch.zeros(5), starts=None, initial_state=None, chunk=None)
    for name, tensor in tensors.items():
        assert getattr(inputs, name) is tensor
    assert ScanInputs.of(
        **tensors | {"term": wide[..., ::2]}, starts=None, initial_state=None, chunk=None
    ).term.is_contiguous()


@BACKENDS_TRITON_SLOW
def test_recomputation_and_repeated_backward_are_bitwise(backend):
    inputs = make(30, 2, 5, state=True, branch=True)
    options = {"backend": backend, "chunk": 8}
    expected = run(inputs, **options)
    assert_close(run(inputs, **options), expected, 0.0)
    assert_close(run(inputs, save_states=False, **options), expected, 0.0)

    y, _ = checkpoint(lambda **leaves: rglru(**leaves, **options), **inputs, use_reentrant=False)
    kept, _ = rglru(**inputs, **options)
    leaves = list(inputs.values())
    once = torch.autograd.grad(kept.sum(), leaves, retain_graph=True)
    twice = torch.autograd.grad(kept.sum(), leaves)
    recomputed = torch.autograd.grad(y.sum(), leaves)
    for first, second, third in zip(once, twice, recomputed, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@BACKENDS_TRITON_SLOW
@pytest.mark.parametrize("save_states", [True, False])
def test_opcheck(backend, save_states):
    """torch.library.opcheck of fake implementations, autograd and mutation."""
    inputs = make(9, 2, 3, state=True, branch=True, dtype=torch.bfloat16)
    inputs["x"] = inputs["x"].detach().transpose(0, 1).contiguous().transpose(0, 1)  # batch-major
    inputs["branch"] = inputs["branch"].detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)  # channels apart
    starts = torch.arange(18).view(9, 2) % 7 == 3
    leaves = [inputs[name] for name in LEAVES[:5]]
    others = (starts, inputs["initial_state"], inputs["gate_bias"])
    torch.library.opcheck(ops.forward, (*leaves, *others, save_states, 8, backend))
    few = {"test_utils": ("test_faketensor", "test_aot_dispatch_static")}
    torch.library.opcheck(ops.forward, (*leaves[:4], None, None, None, None, save_states, None, backend), **few)


@BACKENDS
def test_compiles_as_one_graph(backend):
    """torch.compile sees one operation, forward and backward, for any length."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    def mix(x, gate, decay, branch, starts):
        return rglru(x * 2, gate, gate, decay, branch=branch, starts=starts, backend=backend)

    compiled = torch.compile(mix, backend=aot_autograd(fw_compiler=count), fullgraph=True, dynamic=True)
    for steps in (12, 21):
        inputs = make(steps, 2, 3, branch=True)
        leaves = [inputs[name] for name in ("x", "input_gate", "decay", "branch")]
        starts = torch.rand(steps, 2, generator=torch.Generator().manual_seed(0)) < 0.1
        results = []
        for function in (mix, compiled):
            y, last = function(*leaves, starts)
            results.append((y, last, *torch.autograd.grad(y.square().sum() + last.sum(), leaves)))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 2  # one forward and one backward


def test_second_derivative_is_refused():
    inputs = make(4, 1, 2)
    (grad,) = torch.autograd.grad(rglru(**inputs)[0].square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@BACKENDS
@pytest.mark.parametrize(
    ("branch", "save_states", "kept"),
    [
        (False, True, 4),  # x, the two gates and y
        (False, False, 3),
        (True, True, 5),  # x, the two gates, the branch and the states
        (True, False, 4),
    ],
)
def test_saves(backend, branch, save_states, kept):
    """Besides, only document starts and, to recompute states, the initial states of chunks grow with T."""
    inputs = make(16, 2, 16, dtype=torch.bfloat16, state=True, branch=branch)
    starts = torch.zeros(16, 2, dtype=torch.bool)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        rglru(**inputs, starts=starts, backend=backend, save_states=save_states, chunk=8)
    activations = [tensor for tensor in saved if tensor.numel() == 16 * 2 * 16]
    assert [tensor.dtype for tensor in activations] == [torch.bfloat16] * kept
    chunk_states = 2 * 2 * 16 if backend == "triton" and not save_states else 0
    others = 16 * 2 + 2 * 16 + 16 + (2 * 16 if branch else 0) + chunk_states
    assert sum(tensor.numel() for tensor in saved) == kept * 16 * 2 * 16 + others


def test_inputs_without_gradient():
    inputs = {k: v.detach() for k, v in make(9, 2, 3, state=True, branch=True).items()}
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
        ("branch", torch.zeros(4, 2, 6)),
        ("branch", torch.zeros(4, 2, 3, dtype=torch.float16)),
        ("starts", torch.zeros(2, 4, dtype=torch.bool)),
        ("starts", torch.zeros(4, 2, dtype=torch.int64)),
        ("initial_state", torch.zeros(3)),
        ("initial_state", torch.zeros(2, 3, device="meta")),
        ("backend", "cuda"),
        ("chunk", -1),
    ],
)
def test_refuses(name, value):
    arguments = make(4, 2, 3, state=True) | {name: value}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        rglru(**arguments)


@needs_interpreter
def test_refuses_triton_where_it_cannot_run():
    inputs = make(4, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^backend: 'triton' for torch.float64"):
        rglru(**inputs, backend="triton")
    with (
        mock.patch.object(selection, "is_interpreted", return_value=False),
        pytest.raises(ValueError, match=r"^backend: 'triton' on cpu; accepted on a GPU"),
    ):
        rglru(**make(4, 2, 3), backend="triton")
    assert rglru(**inputs)[0].dtype == torch.float64

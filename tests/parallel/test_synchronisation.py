"""Forward and backward of a stage never wait for the device: its host code runs ahead of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from griffin.kernels.local_attention import resolve_backend
from griffin.kernels.local_attention.varlen import library
from griffin.parallel import megatron_device, sharding
from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECOMPUTES, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.context import Context, Documents, megatron_config, to_device, with_offsets
from griffin.parallel.stage import Stage, build_stages
from griffin.parallel.world.grid import Grid, fake_grid, single_rank_grid

T, B = 64, 2
MODEL = ModelConfig(
    pattern=(RECURRENT, ATTENTION, GLOBAL_ATTENTION),
    width=128,
    recurrent_width=128,
    heads=2,
    head_dim=64,
    gate_blocks=4,
    window=16,
    vocabulary=130,
)
needs_varlen = pytest.mark.skipif(library() is None, reason="needs a PyTorch whose varlen_attn has windows")
META = torch.device("meta")
# Operators whose result's shape, or whose number in Python, depends on values of a tensor.
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "bincount", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "equal", "item", "is_nonzero", "repeat_interleave",
}  # fmt: skip


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(MODEL.vocabulary, (B, T + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(T).expand(B, T) % 23
    return with_offsets({"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": positions})


def run(stage: Stage, given: dict[str, Tensor]) -> None:
    stage(given).total.backward()


@contextmanager
def on_meta(attention: str, recompute: str = "none") -> Iterator[Stage]:
    """A stage of meta tensors, which stand for those of a GPU: no value can be read from them."""
    layout = ParallelConfig()
    with fake_grid(layout, 1, 0) as grid, megatron_device.on_meta():
        context = Context(
            model=MODEL,
            grid=grid,
            megatron=megatron_config(MODEL, layout, torch.bfloat16, META),
            device=META,
            kernels="triton",
            attention=attention,
        )
        yield Stage(context, 0, MODEL.blocks, is_first=True, is_last=True, recompute=recompute)


@pytest.mark.parametrize("attention", [pytest.param("varlen", marks=needs_varlen), "counted"])
@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_no_value_is_read(attention: str, recompute: str) -> None:
    with on_meta(attention, recompute) as stage:
        run(stage, to_device(batch(), META))
        assert all(parameter.grad is not None for parameter in stage.parameters())


@needs_varlen
def test_offsets_that_are_not_given_would_be_read() -> None:
    """So the test above can fail."""
    given = batch()
    del given["cu_seqlens"], given["max_seqlen"]
    with on_meta("varlen") as stage, pytest.raises(NotImplementedError, match="meta tensor"):
        run(stage, to_device(given, META))


def test_the_longest_document_stays_on_the_host() -> None:
    there = to_device(batch(), META)
    assert {name for name, tensor in there.items() if tensor.device.type == "cpu"} == {"max_seqlen"}
    with pytest.raises(AssertionError, match="would wait"):
        Documents.of_batch({name: tensor.to(META) for name, tensor in there.items()})


class _Waiting(TorchDispatchMode):
    """Records operators that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        # Indices may be masks, whose selection has a shape that depends on values.
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or masks:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    with single_rank_grid() as grid:
        yield grid


def make_stage(grid: Grid, dtype: torch.dtype, attention: str) -> Stage:
    (stage,) = build_stages(MODEL, ParallelConfig(), grid, dtype=dtype, sequence=T, attention=attention)
    sharding.initialize([stage], grid, seed=1)
    return stage


def test_no_operator_waits(grid: Grid) -> None:
    """With PyTorch's operators on a CPU."""
    stage, given = make_stage(grid, torch.float32, "sdpa"), batch()
    del given["cu_seqlens"], given["max_seqlen"]  # the second, a number on the host, would be read
    with _Waiting() as waiting:
        run(stage, given)
    assert waiting.found == []


@pytest.mark.parametrize(
    "read", [Tensor.item, Tensor.nonzero, Tensor.__bool__, lambda x: x[x > 0], lambda x: torch.equal(x, x.clone())]
)
def test_waiting_operators_are_seen(read: Callable[[Tensor], object]) -> None:
    with _Waiting() as waiting:
        read(torch.zeros(1))
    assert waiting.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["flash", "varlen", "flex"])
def test_a_gpu_is_not_waited_for(grid: Grid, attention: str) -> None:
    try:
        resolve_backend(attention, grid.device, torch.bfloat16, MODEL.head_dim)
    except ValueError as error:
        pytest.skip(str(error))
    stage = make_stage(grid, torch.bfloat16, attention)
    given = to_device({name: tensor.pin_memory() for name, tensor in batch().items()}, grid.device)
    run(stage, given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(stage, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")

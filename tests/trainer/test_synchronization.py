"""How often the host waits for the device in a step: counted on meta tensors, which stand for those of a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from griffin.parallel import megatron_device
from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import fake_grid, rank_grid
from griffin.trainer.health.spikes import SpikeDetector
from griffin.trainer.step import Training
from tests.layouts import SEQUENCE, make_config, micro_batches
from tests.ranks import RankPool

# Their results are read by the host, or have a shape that it must know.
READ = {"_local_scalar_dense": 0, "equal": False, "is_nonzero": False}
SHAPED = ("nonzero", "masked_select", "bincount", "unique_dim", "_unique2")
REPLICAS_EVERY = 2


class Waits(TorchDispatchMode):
    """Collects the operations within it for which a host waits for its GPU; what the host reads is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._made = _Made(self.found)

    def __enter__(self) -> Waits:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._made.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_"):  # unknown on meta tensors
            return torch._C._distributed_c10d.FakeWork().boxed()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if "meta" in devices and name in READ:
            self.found.append(name)
            return READ[name]
        if "meta" in devices and (name in SHAPED or _is_counted_mask(name, args)):
            self.found.append(name)
            raise AssertionError(f"{name} waits for the device")
        if name == "_to_copy" and (target := kwargs.get("device")) is not None and {target.type} != devices:
            self.found.append(f"copy to {'host' if target.type == 'cpu' else 'device'}")
            if target.type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and len(devices) > 1:
            self.found.append("copy to device")
        return func(*args, **kwargs)


def _is_counted_mask(name: str, args: Any) -> bool:
    """Whether a mask is used as an index, whose elements are counted. One number is filled in without counting them."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    is_number = name != "index" and args[2].numel() == 1
    return not is_number and any(index is not None and index.dtype == torch.bool for index in args[1])


class _Made(TorchFunctionMode):
    """Collects tensors that are made of Python's numbers on the device, which copies them from pageable memory."""

    def __init__(self, found: list[str]) -> None:
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device") or "cpu") != "cpu":
            self._found.append("copy to device")
        return func(*args, **kwargs)


def meta_batches() -> Iterator[dict[str, Tensor]]:
    dtypes = {"tokens": torch.int64, "labels": torch.int64, "positions": torch.int64, "loss_mask": torch.float32}
    while True:
        yield {name: torch.empty(2, SEQUENCE, dtype=dtype, device="meta") for name, dtype in dtypes.items()}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of megatron-core's, which its module does not show here
@pytest.mark.parametrize(
    ("layout", "world", "settings"),
    [
        (ParallelConfig(), 2, {"overlap": "on", "dtype": "bfloat16"}),
        (ParallelConfig(tensor=2, sequence_parallel=True), 4, {"recompute": "block", "z_loss": 1e-4}),
    ],
    ids=["dp2-overlap", "tp2-dp2-sequence-parallel-recompute"],
)
def test_the_host_waits_once_a_step(layout: ParallelConfig, world: int, settings: dict[str, Any]) -> None:
    config = make_config("griffin", layout, **settings)
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, clip=1e-9),  # the norm is 0, and is clipped
        health=dataclasses.replace(config.health, replica_interval=REPLICAS_EVERY),
    )
    with fake_grid(layout, world, 0) as grid, megatron_device.on_meta():
        training = Training(config, grid)
        spikes = SpikeDetector(config.train)
        for _ in range(REPLICAS_EVERY):
            with Waits() as waits:
                training.step(meta_batches(), stop=True, detect_spike=spikes.detect)
            assert waits.found == ["copy to host"]
        with Waits() as waits:
            training.step(meta_batches(), measure=True, health=True)
        assert waits.found == ["copy to host", "copy to device", "copy to host"]  # the second copy goes with the third


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x),
        lambda x: bool(x.isfinite().all()),
        lambda x: torch.equal(x, x),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.copy_(torch.zeros(x.shape)),
        lambda x: torch.zeros(x.shape).to(x.device),
    ],
    ids=["item", "tolist", "cpu", "mask", "put", "bool", "equal", "bincount", "tensor", "copy", "to"],
)
def test_waits_are_found(wait: Any) -> None:
    """Of this module's own count."""
    x = torch.empty(4, device="meta")
    with Waits() as waits, suppress(AssertionError):
        wait(x)
    assert waits.found


def synchronized(ranks: Any) -> int:
    config = make_config("griffin", ParallelConfig(pipeline=2))
    with rank_grid(config.parallel, ranks) as grid:
        training = Training(config, grid)
        calls: list[None] = []
        plain = p2p_communication.torch.cuda.synchronize
        p2p_communication.torch.cuda.synchronize = lambda *_: calls.append(None)
        try:
            training.step(iter(micro_batches(config, 0, grid.data_rank, grid.data_size)))
        finally:
            p2p_communication.torch.cuda.synchronize = plain
        return len(calls)


def test_pipeline_stages_do_not_wait_for_their_sends(rank_pool: RankPool) -> None:
    assert rank_pool.run(synchronized, 2) == [0, 0]

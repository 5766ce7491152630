"""The rank grid: which tensor-, pipeline- and data-parallel place a rank has, and the process groups of each."""

from __future__ import annotations

import datetime
import faulthandler
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from griffin.parallel import host
from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.affinity import stay_near
from griffin.parallel.world.axes import Axes, rank_name
from griffin.parallel.world.messages import seal, unseal
from griffin.parallel.world.ranks import OtherRankError, Ranks

T = TypeVar("T")

# A rank that waits for another's slow but healthy work (building an index, say) asks again this often.
POLL = datetime.timedelta(seconds=20)
START_SECONDS = 15 * 60.0  # for a thousand ranks to connect, which takes a minute or two


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A rank's place, and the groups that it is in."""

    rank: int
    axes: Axes
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    embedding_group: dist.ProcessGroup | None  # first and last stage; None on other stages and where there is one stage
    device: torch.device
    store: dist.Store
    key: bytes = field(default=b"", repr=False)  # that ranks sign with what they put into the store

    @property
    def world_size(self) -> int:
        return self.axes.world_size

    @property
    def tensor_rank(self) -> int:
        return self.axes.coordinate(self.rank, "tensor")

    @property
    def tensor_size(self) -> int:
        return self.axes.size("tensor")

    @property
    def pipeline_rank(self) -> int:
        return self.axes.coordinate(self.rank, "pipeline")

    @property
    def pipeline_size(self) -> int:
        return self.axes.size("pipeline")

    @property
    def data_rank(self) -> int:
        return self.axes.coordinate(self.rank, "data")

    @property
    def data_size(self) -> int:
        return self.axes.size("data")

    @property
    def is_first_rank(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    def all_gather(self, value: T, kind: Any) -> list[T]:
        """Every rank's value, in the order of ranks, read as `kind` (see `parallel.world.messages`). A collective.

        ForgedError where a peer gives what no rank of this run has written, or something of another kind.
        """
        if self.world_size == 1:
            return [value]
        words = gather_bytes(seal(self.key, _word(self.rank), value), self.device)
        return [unseal(self.key, _word(rank), word, kind, "a peer gave") for rank, word in enumerate(words)]

    def first_rank_does(self, name: str, work: Callable[[], object]) -> None:
        """Run `work` on rank 0 while the others wait for as long as it takes.

        They wait on the store, not in a collective, so no communication timeout bounds the work. An exception of rank
        0 is raised there, and an OtherRankError on the others. `name` is unique within the process group's life.
        """
        if self.world_size == 1:
            work()
            return
        key = f"griffin/{name}"
        if self.rank == 0:
            try:
                work()
            except BaseException as error:
                self.put(key, f"{type(error).__name__}: {error}")
                raise
            self.put(key, "")
            return
        while True:
            try:
                self.store.wait([key], POLL)
                break
            except dist.DistStoreError:
                continue
        if failure := self.get(key, str):
            raise OtherRankError(f"rank 0 failed at {name}: {failure}")

    def put(self, name: str, value: Any) -> None:
        """Put a value into the store, signed."""
        self.store.set(name, seal(self.key, name, value))  # type: ignore[arg-type]  # it takes bytes as well

    def get(self, name: str, kind: Any) -> Any:
        """A value that a rank has put into the store. ForgedError where no rank of this run has."""
        return unseal(self.key, name, self.store.get(name), kind)


def _word(rank: int) -> str:
    return f"word of rank {rank}"


def gather_bytes(data: bytes, device: torch.device) -> list[bytes]:
    """What every rank of the default process group gives, in the order of ranks."""
    world_size = dist.get_world_size()
    sizes = torch.empty(world_size, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(data)], device=device))
    longest = int(sizes.max())
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    if data:
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    everyone = torch.empty(world_size * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everyone, mine)
    rows = everyone.cpu().view(world_size, longest)
    return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes.tolist(), strict=True)]


@contextmanager
def rank_grid(
    layout: ParallelConfig,
    ranks: Ranks,
    *,
    timeout: datetime.timedelta = datetime.timedelta(minutes=30),
) -> Iterator[Grid]:
    """Start torch.distributed and megatron-core's process groups, and stop both at the end.

    NCCL is used where there is a GPU, gloo elsewhere. The world size must be a multiple of `layout.model_ranks`.
    RuntimeError on a rank that sees a GPU where others see none, or the reverse.
    """
    # Read when CUDA starts: kernels then run in the order of their launch, which overlapping megatron-core's
    # tensor-parallel communication with computation relies on.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = host.device(ranks.local_rank)
    store = ranks.store()
    _agree_on_backend(store, ranks, backend_of(device))
    if ranks.is_on_one_machine:
        _stay_on_this_machine()
    host.install()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stay_near(device)
    # NCCL's own threads may not depend on Python. Named, as C++ does not keep its Python half alive.
    groups_store = store if device.type == "cuda" else SignedStore(store, ranks.key)
    with ExitStack() as stack:
        with _starting():
            dist.init_process_group(
                backend_of(device),
                store=groups_store,
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
            stack.enter_context(_model_parallel(layout, timeout))
            # The first collective makes connections too. Where the launcher has given no key, ranks have one from here.
            drawn = gather_bytes(secrets.token_bytes(32) if ranks.rank == 0 else b"", device)[0]
        yield _read(device, store, ranks.key + drawn)
    # Not after an error: the other ranks may be in a collective, and waiting for them would be in vain.
    dist.destroy_process_group()
    _leave_together(store, ranks)


class SignedStore(dist.Store):
    """A store whose values are signed: gloo takes addresses from it, and would crash on what is none."""

    def __init__(self, store: dist.Store, key: bytes) -> None:
        super().__init__()
        self._store, self._key = store, key

    def set(self, name: str, value: bytes | str) -> None:
        text = value.encode() if isinstance(value, str) else value
        self._store.set(name, seal(self._key, name, text))  # type: ignore[arg-type]  # it takes bytes as well

    def get(self, name: str) -> bytes:
        return unseal(self._key, name, self._store.get(name), bytes)

    def add(self, name: str, value: int) -> int:
        return self._store.add(name, value)

    def check(self, names: list[str]) -> bool:
        return self._store.check(names)

    def wait(self, names: list[str], timeout: datetime.timedelta | None = None) -> None:
        self._store.wait(names, *[] if timeout is None else [timeout])

    def delete_key(self, name: str) -> bool:
        return self._store.delete_key(name)


@contextmanager
def _starting() -> Iterator[None]:
    """NCCL makes its connections without a time limit: here is one, after which this process leaves its stacks on
    stderr and ends with exit code 1."""
    faulthandler.dump_traceback_later(START_SECONDS, file=2, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _agree_on_backend(store: dist.Store, ranks: Ranks, backend: str) -> None:
    """A rank whose GPUs have failed falls back to gloo: NCCL of the others would wait for it without end."""
    name, mine = "griffin/backend", rank_name(ranks.rank, socket.gethostname())
    sealed = seal(ranks.key, name, (backend == "nccl", mine))
    found = store.compare_set(name, "", sealed)  # type: ignore[arg-type]  # it takes bytes as well
    on_gpu, other = unseal(ranks.key, name, found, tuple[bool, str])
    if on_gpu != (backend == "nccl"):
        raise RuntimeError(f"{mine} {_sees(not on_gpu)}, but {other} {_sees(on_gpu)}")


def _sees(on_gpu: bool) -> str:
    return "sees a GPU" if on_gpu else "sees no GPU"


def _stay_on_this_machine() -> None:
    """Let gloo and NCCL listen on the loopback interface alone, unless their user has chosen."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)


def _leave_together(store: dist.Store, ranks: Ranks) -> None:
    """Wait until all ranks have come here. srun ends the others when one has ended with the code of a stop, and none
    may have anything left to do then; but stopping NCCL takes some longer than others."""
    deadline = time.monotonic() + 30.0
    with suppress(dist.DistError):  # a rank has been ended
        if store.add("griffin/leaving", 1) == ranks.world_size:
            store.set("griffin/all are leaving", "")
        store.wait(["griffin/all are leaving"], datetime.timedelta(seconds=30))
        if ranks.rank != 0:
            store.add("griffin/left", 1)
            return
        while store.add("griffin/left", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.005)  # rank 0 may serve the store: it is the last


@contextmanager
def single_rank_grid() -> Iterator[Grid]:
    """A world of one rank in this process: for counting on meta tensors, for benchmarks and for tests."""
    host.install()
    device = host.device()
    store = dist.HashStore()
    dist.init_process_group(backend_of(device), store=store, rank=0, world_size=1)
    try:
        with _model_parallel(ParallelConfig(), datetime.timedelta(minutes=1)):
            yield _read(device, store)
    finally:
        dist.destroy_process_group()


@contextmanager
def absent_grid(layout: ParallelConfig, world_size: int, rank: int) -> Iterator[Grid]:
    """One rank's place in a world of ranks that are not there: groups are formed, what they exchange is nothing.

    To plan on meta tensors what many ranks would hold.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    host.install()
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)
    try:
        with _model_parallel(layout, datetime.timedelta(minutes=1)):
            yield _read(torch.device("meta"), store)
    finally:
        dist.destroy_process_group()


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


@contextmanager
def _model_parallel(layout: ParallelConfig, timeout: datetime.timedelta) -> Iterator[None]:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def _read(device: torch.device, store: dist.Store, key: bytes = b"") -> Grid:
    """Read megatron-core's global state once; everything else is handed a Grid."""
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
    }
    rank, axes = dist.get_rank(), Axes.of(**{axis: group.size() for axis, group in groups.items()})
    assert axes.world_size == dist.get_world_size(), axes
    for axis, group in groups.items():
        assert axes.coordinate(rank, axis) == group.rank(), (axis, rank, axes)
    is_pipelined = axes.size("pipeline") > 1
    return Grid(
        rank=rank,
        axes=axes,
        tensor_group=groups["tensor"],
        data_group=groups["data"],
        embedding_group=parallel_state.get_embedding_group(check_initialized=False) if is_pipelined else None,
        device=device,
        store=store,
        key=key,
    )

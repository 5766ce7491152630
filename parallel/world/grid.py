"""Rank grid: coordinates and process groups of a rank, and startup and shutdown of torch.distributed."""

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

from griffin.parallel import megatron_device
from griffin.parallel.config import AXES, ParallelConfig
from griffin.parallel.world.affinity import bind_near
from griffin.parallel.world.axes import Axes, rank_name
from griffin.parallel.world.messages import seal, unseal
from griffin.parallel.world.ranks import OtherRankError, Ranks

T = TypeVar("T")

# Polling interval of ranks that wait for slow but healthy work of rank 0, such as building an index.
POLL = datetime.timedelta(seconds=20)
START_SECONDS = 15 * 60.0  # limit for ranks to connect; a thousand take a minute or two


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Coordinates of a rank, its process groups, device and store."""

    rank: int
    axes: Axes
    tensor_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup  # ranks that hold the same weights
    pipeline_group: dist.ProcessGroup
    embedding_group: dist.ProcessGroup | None  # first and last stage; None on other stages or with one stage
    device: torch.device
    store: dist.Store
    key: bytes = field(default=b"", repr=False)  # signs what ranks put into the store

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

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank is the first of those with the same weights."""
        return self.axes.replica(self.rank) == 0

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's loss counts: the first rank on the last stage of those with the same tokens."""
        axes = (axis.name for axis in AXES if not axis.shards_tokens and axis.name != "pipeline")
        return self.is_last_stage and all(self.axes.coordinate(self.rank, axis) == 0 for axis in axes)

    def all_gather(self, value: T, kind: Any) -> list[T]:
        """All-gather a value, in rank order, parsed as type `kind` (see `parallel.world.messages`). A collective.

        Raises ForgedError for a message that no rank of this run signed, or of another type.
        """
        if self.world_size == 1:
            return [value]
        messages = gather_bytes(seal(self.key, _message_name(self.rank), value), self.device)
        return [
            unseal(self.key, _message_name(rank), message, kind, "a peer sent") for rank, message in enumerate(messages)
        ]

    def first_rank_does(self, name: str, work: Callable[[], object]) -> None:
        """Run `work` on rank 0 while the other ranks wait, without a time limit.

        They wait on the store, not in a collective, so no communication timeout applies. An exception is raised on rank
        0, and an OtherRankError on the others. `name` must be unique during the life of the process group.
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
        """Sign a value and put it into the store."""
        self.store.set(name, seal(self.key, name, value))  # type: ignore[arg-type]  # it takes bytes as well

    def get(self, name: str, kind: Any) -> Any:
        """Return a value from the store. Raises ForgedError if no rank of this run signed it."""
        return unseal(self.key, name, self.store.get(name), kind)


def _message_name(rank: int) -> str:
    return f"message of rank {rank}"


def gather_bytes(data: bytes, device: torch.device) -> list[bytes]:
    """All-gather bytes of any length over the default process group, in rank order."""
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
    """Context that initialises torch.distributed and megatron-core's process groups, and destroys both at the end.

    The backend is NCCL with a GPU, else gloo. The world size must be a multiple of `layout.model_ranks`. Raises
    RuntimeError if some ranks see a GPU and others do not.
    """
    set_cuda_defaults(layout)
    device = megatron_device.device(ranks.local_rank)
    store = ranks.store()
    _agree_on_backend(store, ranks, backend_of(device))
    if ranks.is_on_one_machine:
        _use_loopback_interface()
    megatron_device.install()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bind_near(device)
    # NCCL's threads must not call into Python. The variable keeps the Python object alive, which C++ does not.
    groups_store = store if device.type == "cuda" else SignedStore(store, ranks.key)
    with ExitStack() as stack:
        with _start_deadline():
            dist.init_process_group(
                backend_of(device),
                store=groups_store,
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
            stack.enter_context(_model_parallel(layout, timeout))
            # The first collective also connects the ranks, and gives them a key if the launcher set none.
            drawn_key = gather_bytes(secrets.token_bytes(32) if ranks.rank == 0 else b"", device)[0]
        yield _build_grid(device, store, ranks.key + drawn_key)
    # Not after an error: the other ranks may be blocked in a collective.
    dist.destroy_process_group()
    _leave_together(store, ranks)


def set_cuda_defaults(layout: ParallelConfig) -> None:
    """Set environment variables that CUDA and PyTorch's allocator read at their start, unless they are set."""
    if layout.tensor > 1:
        # Kernels then run in launch order, on which megatron-core's overlap of tensor-parallel communication with
        # computation relies. Otherwise it only delays data-parallel communication.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # NCCL must not register buffers in segments that expand, as it would for a CUDA graph only.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Reduces fragmentation by activations of different lifetimes.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


class SignedStore(dist.Store):
    """Store with signed values, for gloo, which reads addresses from it and would crash on malformed ones."""

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
def _start_deadline() -> Iterator[None]:
    """Time limit for connecting, which NCCL lacks: prints stack traces to stderr and exits with code 1."""
    faulthandler.dump_traceback_later(START_SECONDS, file=2, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _agree_on_backend(store: dist.Store, ranks: Ranks, backend: str) -> None:
    """Raise RuntimeError if ranks differ in the backend.

    A rank whose GPUs have failed would use gloo, and the others' NCCL would wait for it forever.
    """
    name, mine = "griffin/backend", rank_name(ranks.rank, socket.gethostname())
    sealed = seal(ranks.key, name, (backend == "nccl", mine))
    found = store.compare_set(name, "", sealed)  # type: ignore[arg-type]  # it takes bytes as well
    on_gpu, other = unseal(ranks.key, name, found, tuple[bool, str])
    if on_gpu != (backend == "nccl"):
        raise RuntimeError(f"{mine} {_sees(not on_gpu)}, but {other} {_sees(on_gpu)}")


def _sees(on_gpu: bool) -> str:
    return "sees a GPU" if on_gpu else "sees no GPU"


def _use_loopback_interface() -> None:
    """Make gloo and NCCL listen on the loopback interface only, unless the environment says otherwise."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)


def _leave_together(store: dist.Store, ranks: Ranks) -> None:
    """Wait for all ranks before exiting.

    When one rank exits with the code of a stop, srun ends the others, which may still be shutting down NCCL.
    """
    deadline = time.monotonic() + 30.0
    with suppress(dist.DistError):  # a rank was killed
        if store.add("griffin/leaving", 1) == ranks.world_size:
            store.set("griffin/all are leaving", "")
        store.wait(["griffin/all are leaving"], datetime.timedelta(seconds=30))
        if ranks.rank != 0:
            store.add("griffin/left", 1)
            return
        while store.add("griffin/left", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.005)  # rank 0 may serve the store, so it leaves last


@contextmanager
def single_rank_grid() -> Iterator[Grid]:
    """Context of a world of one rank in this process, for counting on meta tensors, benchmarks and tests."""
    megatron_device.install()
    device = megatron_device.device()
    store = dist.HashStore()
    dist.init_process_group(backend_of(device), store=store, rank=0, world_size=1)
    try:
        with _model_parallel(ParallelConfig(), datetime.timedelta(minutes=1)):
            yield _build_grid(device, store)
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_grid(layout: ParallelConfig, world_size: int, rank: int) -> Iterator[Grid]:
    """Context of one rank in a world of `world_size` ranks without the other processes.

    Process groups exist but communicate nothing. For planning on meta tensors what many ranks would hold.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    megatron_device.install()
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)
    try:
        with _model_parallel(layout, datetime.timedelta(minutes=1)):
            yield _build_grid(torch.device("meta"), store)
    finally:
        dist.destroy_process_group()


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


@contextmanager
def _model_parallel(layout: ParallelConfig, timeout: datetime.timedelta) -> Iterator[None]:
    parallel_state.initialize_model_parallel(
        **layout.megatron_sizes,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def _build_grid(device: torch.device, store: dist.Store, key: bytes = b"") -> Grid:
    """Build the Grid from megatron-core's global state, which is read only here."""
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
    }
    replica_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    rank, axes = dist.get_rank(), Axes.of(**{axis: group.size() for axis, group in groups.items()})
    assert axes.world_size == dist.get_world_size(), axes
    for axis, group in groups.items():
        assert axes.coordinate(rank, axis) == group.rank(), (axis, rank, axes)
    assert (axes.replica(rank), axes.replicas) == (replica_group.rank(), replica_group.size()), (rank, axes)
    is_pipelined = axes.size("pipeline") > 1
    return Grid(
        rank=rank,
        axes=axes,
        tensor_group=groups["tensor"],
        replica_group=replica_group,
        pipeline_group=groups["pipeline"],
        embedding_group=parallel_state.get_embedding_group(check_initialized=False) if is_pipelined else None,
        device=device,
        store=store,
        key=key,
    )

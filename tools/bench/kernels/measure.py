"""Check and time what `griffin bench kernels` is asked for, and print results as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from griffin.tools.bench.kernels.rows import COLUMNS, RANK_COLUMNS, PeerRow, RankRow, Row, Times
from griffin.tools.bench.kernels.settings import Settings

if TYPE_CHECKING:
    import torch

    from griffin.tools.bench.kernels.operations import Operation
    from griffin.tools.bench.kernels.peers import Peer
    from griffin.tools.bench.kernels.recurrences import Shape
    from griffin.tools.bench.kernels.timing import Clock

GIB = 2**30
SETS = 3  # sets of inputs that rounds use in turn
LARGE_SET = 2**30  # bytes: a set this large does not fit into any cache, so one is enough
MARGIN = 1.1  # factor on memory, for states of chunks and fragmentation


@dataclass(frozen=True)
class Measured:
    """failures: why operations were not timed whose results are wrong."""

    rows: list[Row] = field(default_factory=list)
    ranks: list[RankRow] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def measure(settings: Settings, device: torch.device, clock: Clock | None = None) -> Measured:
    """Measure everything that the settings select."""
    import torch

    from griffin.tools.bench.kernels import timing
    from griffin.tools.bench.kernels.operations import CHANNELS, TOLERANCE

    dtype = getattr(torch, settings.dtype)
    clock = clock or timing.Clock(device)
    if settings.peers:
        from griffin.tools.bench.kernels.peers import installed

        for package, version in installed().items():
            print(f"peer {package}: {version or f'not installed; pip install {package}'}")
    bandwidth = timing.copy_bandwidth(clock, device, settings.copy_bytes, settings.repeats)
    products = timing.product_rate(clock, device, dtype, settings.product_size, settings.repeats)
    print(
        f"copy of {settings.copy_bytes / GIB:.2f} GiB: {bandwidth / 1e9:,.0f} GB/s, read and written bytes counted\n"
        f"product of two matrices of {settings.product_size} x {settings.product_size}: {products / 1e12:,.1f} "
        f"TFLOP/s\n{settings.dtype}, time-major; medians of {settings.repeats} rounds of the device's own time, inputs "
        f"not in cache\nthe floor of a recurrence is each tensor read or written once, as fast as the copy; GB/s are "
        f"the floor's bytes over the time of forward and backward\nbefore it is timed, each result and gradient is "
        f"compared with float64, of recurrences on {CHANNELS} channels: to {TOLERANCE[dtype]:.0e} of its largest value",
        flush=True,
    )
    measured = Measured()
    measure_recurrences(measured, settings, device, clock, bandwidth)
    measure_ranks(measured, settings, device, clock, bandwidth, products)
    if settings.peers:
        done = {row.shape for row in measured.rows if row.operation == "rglru"}
        shapes = [shape for shape in settings.shapes() if shape in done]
        _measure_peers(settings, device, clock, shapes, measured.peers)
    return measured


def measure_recurrences(
    measured: Measured, settings: Settings, device: torch.device, clock: Clock, bandwidth: float
) -> None:
    """Measure recurrences and convolution, and add what is found to `measured`."""
    import torch

    from griffin.kernels.recurrence.plan import select_plan
    from griffin.kernels.triton_launch import multiprocessors
    from griffin.tools.bench.kernels.floors import counted
    from griffin.tools.bench.kernels.recurrences import OPERATIONS

    for shape in settings.shapes():
        plan = select_plan(shape.steps, shape.batch, shape.width, multiprocessors(device), settings.chunk)
        print(f"\n{shape}: {plan.reason}\n{COLUMNS}", flush=True)
        path = "sequential" if plan.chunks == 1 else f"{plan.chunks} chunks of {plan.chunk}"
        for operation in OPERATIONS:
            times = _time_if_possible(operation, shape, settings, device, clock, measured.failures)
            if times is None:
                continue
            floor_bytes = counted(operation, shape, getattr(torch, settings.dtype)).bytes
            row = Row(operation.name, shape, path if operation.in_chunks else "", times, floor_bytes, bandwidth)
            measured.rows.append(row)
            print(row, flush=True)


def measure_ranks(
    measured: Measured, settings: Settings, device: torch.device, clock: Clock, bandwidth: float, products: float
) -> None:
    """Measure the operations of models' ranks, and add what is found to `measured`."""
    import torch

    from griffin.tools.bench.kernels.floors import counted
    from griffin.tools.bench.kernels.rank_operations import OPERATIONS

    if settings.ranks:
        print(
            "\neach operation at the sizes of a model's rank; its floor: for each of its operators, the time for the "
            "bytes that it states as fast as the copy,\nor for its FLOPs as fast as the product, whichever is longer"
        )
    for shape in settings.ranks:
        print(f"\n{shape}\n{RANK_COLUMNS}", flush=True)
        for operation in OPERATIONS:
            times = _time_if_possible(operation, shape, settings, device, clock, measured.failures)
            if times is not None:
                expected = counted(operation, shape, getattr(torch, settings.dtype))
                row = RankRow(operation.name, times, expected, bandwidth, products)
                measured.ranks.append(row)
                print(row, flush=True)


def needed_bytes(operation: Operation, shape: Any, dtype: torch.dtype) -> int:
    """Return the bytes for all sets of inputs, one forward and backward, and the check in float64."""
    from griffin.tools.bench.kernels.floors import counted
    from griffin.tools.bench.kernels.operations import CHANNELS

    found = counted(operation, shape, dtype)
    at_work = found.peak + sets_of_inputs(operation, shape, dtype) * found.inputs
    compared = 3 * (8 // dtype.itemsize) * (found.peak + found.inputs)
    if not operation.mixes_channels:
        compared = compared * min(CHANNELS, shape.width) // shape.width
    return int(MARGIN * (at_work + compared))


def sets_of_inputs(operation: Operation, shape: Any, dtype: torch.dtype) -> int:
    from griffin.tools.bench.kernels.floors import counted

    return 1 if counted(operation, shape, dtype).inputs >= LARGE_SET else SETS


def _time_if_possible(
    operation: Operation, shape: Any, settings: Settings, device: torch.device, clock: Clock, failures: list[str]
) -> Times | None:
    """Check and time an operation.

    Prints a line and returns None if it cannot run, or not in the device's memory; also if its results are wrong, which
    is added to `failures`.
    """
    import torch

    from griffin.tools.bench.kernels import operations, timing

    dtype = getattr(torch, settings.dtype)
    if (refusal := operation.refuses(shape, dtype, device)) is not None:
        print(f"{operation.name:<22}skipped: {refusal}")
        return None
    needed, free = needed_bytes(operation, shape, dtype), timing.free_bytes(device)
    if needed > free:
        print(f"{operation.name:<22}skipped: needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")
        return None
    try:
        sets = operations.make_sets(operation, shape, dtype, device, sets_of_inputs(operation, shape, dtype))
        side = operations.our_implementation(operation, sets, settings.chunk)
        operations.check(f"{operation.name}, {shape}", side, operation, sets[0])
        return timing.time_implementations(clock, {"ours": side}, settings.repeats)["ours"]
    except operations.DifferenceError as error:
        print(error, flush=True)
        failures.append(str(error))
        return None
    except torch.OutOfMemoryError:
        print(f"{operation.name:<22}skipped: {free / GIB:.1f} GiB of free memory are not enough")
        return None


def _measure_peers(
    settings: Settings, device: torch.device, clock: Clock, shapes: Sequence[Shape], rows: list[PeerRow]
) -> None:
    """Time the peers and append to `rows`."""
    from griffin.tools.bench.kernels.peers import load_peers

    peers, reasons = load_peers(min(settings.lengths))
    print("\nrglru from a zero state beside peers, each with inputs in its own layout: forward, backward, both")
    for name, reason in reasons.items():
        print(f"{name}: skipped ({reason})")
    for shape in shapes:
        print(shape, flush=True)
        if not _measure_beside(peers, shape, settings, device, clock, rows):
            return


def _measure_beside(
    peers: Sequence[Peer],
    shape: Shape,
    settings: Settings,
    device: torch.device,
    clock: Clock,
    rows: list[PeerRow],
) -> bool:
    """Measure all peers for one shape; returns False if the device no longer works.

    A failure of a peer ends only the measurement of that peer.
    """
    import torch

    from griffin.tools.bench.kernels import operations, timing
    from griffin.tools.bench.kernels.peers import describe, time_peer
    from griffin.tools.bench.kernels.recurrences import RGLRU_FROM_ZERO

    operation, dtype = RGLRU_FROM_ZERO, getattr(torch, settings.dtype)
    torch.compiler.reset()  # a function compiled for too many shapes would run uncompiled
    timing.free_bytes(device)
    try:
        sets = operations.make_sets(operation, shape, dtype, device, sets_of_inputs(operation, shape, dtype))
        ours = operations.our_implementation(operation, sets, settings.chunk)
        operations.check(f"rglru from a zero state, {shape}", ours, operation, sets[0])
    except torch.OutOfMemoryError as error:
        print(f"  skipped ({describe(error)})")
        return True
    for peer in peers:
        refusal = peer.refuses(shape)
        if refusal is None:
            try:
                row = PeerRow(peer.name, shape, *time_peer(peer, shape, clock, ours, settings.repeats))
                rows.append(row)
                print(row, flush=True)
                continue
            except Exception as error:
                refusal = describe(error)
        print(f"  {peer.name}: skipped ({refusal})", flush=True)
        if not device_works(device):
            print(f"the device no longer works after {peer.name}: no other peer is measured")
            return False
    return True


def device_works(device: torch.device) -> bool:
    """Whether a device still works, after freeing memory: an access out of bounds makes it unusable."""
    import torch

    from griffin.tools.bench.kernels.timing import free_bytes

    try:
        free_bytes(device)
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True

"""`griffin bench kernels`: the Triton kernels on a GPU, beside their memory traffic bound and beside peers."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from griffin.tools.bench import kernels_plot
from griffin.tools.bench.kernels_rows import PeerRow, Row
from griffin.tools.common.arguments import add_dtype
from griffin.tools.common.plots import require_new_plot

if TYPE_CHECKING:
    import torch

    from griffin.tools.bench.kernels_operations import Clock, Operation, Shape, Times
    from griffin.tools.bench.kernels_peers import Peer

DTYPES = ("bfloat16", "float32")
COPY_BYTES = 2**30
GIB = 2**30
GOALS = ((32768, 1.25), (4096, 1.6))  # (least B R, most time over the byte floor) of the RG-LRU without branch
COLUMNS = f"{'':<16}{'path':<22}{'forward':>12}{'backward':>12}{'GB/s':>8}{'of copy':>9}{'over floor':>12}"


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "kernels",
        help="the kernels on a GPU, beside a copy's bandwidth and other scans",
        description="Time the RG-LRU, with and without its branch, the convolution, and attention with each backend "
        "that can run, forward and backward on one GPU. Print the bandwidth they reach and its share of a copy's, "
        "measured in the same run, and for attention the TFLOP/s. Time the RG-LRU beside accelerated-scan, "
        "flash-linear-attention, transformers and torch's associative_scan, if installed. "
        "Every result and gradient is compared with float64 before anything is timed.",
    )
    widths = "512,1024,2048,4096,8192"
    parser.add_argument("--widths", default=widths, metavar="R,...", help=f"channels (default: {widths})")
    parser.add_argument("--lengths", default="2048,8192,32768", metavar="T,...", help="default: 2048,8192,32768")
    parser.add_argument("--batches", default="1,8", metavar="B,...", help="sequences (default: 1,8)")
    add_dtype(parser, "dtype of the inputs (default: bfloat16)", "bfloat16")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed rounds (default: 20)")
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="steps per chunk, 0 for a sequential scan (default: chosen by shape)"
    )
    parser.add_argument("--no-peers", action="store_true", help="measure only this project's kernels")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot shares of the bandwidth to a new file")
    parser.set_defaults(run=run)


@dataclass(frozen=True, kw_only=True)
class Settings:
    widths: tuple[int, ...]  # R
    lengths: tuple[int, ...]  # T
    batches: tuple[int, ...]  # B
    dtype: str
    repeats: int
    chunk: int | None
    peers: bool
    copy_bytes: int = COPY_BYTES

    def shapes(self) -> list[Shape]:
        from griffin.tools.bench.kernels_operations import Shape

        return [Shape(R, T, B) for R in self.widths for T in self.lengths for B in self.batches]


def run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if args.plot is not None:
        require_new_plot("--plot", args.plot, (".png",))

    import torch

    if not torch.cuda.is_available():
        raise ValueError("bench kernels: needs a CUDA device and a PyTorch built for it; torch finds none here")
    if find_spec("triton") is None:
        raise ValueError("bench kernels: needs the package triton; pip install triton")
    import triton

    from griffin.tools.bench.kernels_attention import measure_attention

    if triton.knobs.runtime.interpret:
        raise ValueError("bench kernels: TRITON_INTERPRET=1 runs the kernels in Python; it must not be set")
    device = torch.device("cuda", torch.cuda.current_device())
    title = f"{torch.cuda.get_device_name(device)}, {settings.dtype}"
    print(
        f"{time.strftime('%Y-%m-%d')}; {torch.cuda.get_device_name(device)}; python {platform.python_version()}, "
        f"torch {torch.__version__}, triton {triton.__version__}"
    )
    rows, peer_rows = measure(settings, device)
    measure_attention(device, getattr(torch, settings.dtype), settings.repeats)
    print("\n".join(summary(rows, peer_rows, settings.dtype)))
    if args.plot is not None:
        kernels_plot.plot(rows, args.plot, title)
        print(f"{args.plot}: shares of the copy's bandwidth")
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    """Return the settings of the command line. Raises ValueError for invalid ones."""
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: accepted: {', '.join(DTYPES)}")
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: must be at least 1")
    if args.chunk is not None and args.chunk < 0:
        raise ValueError(f"--chunk {args.chunk}: must be a number of steps, or 0 for a sequential scan")
    return Settings(
        widths=_numbers("--widths", args.widths),
        lengths=_numbers("--lengths", args.lengths),
        batches=_numbers("--batches", args.batches),
        dtype=args.dtype,
        repeats=args.repeats,
        chunk=args.chunk,
        peers=not args.no_peers,
    )


def _numbers(setting: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise ValueError(f"{setting} {text}: must be numbers of at least 1, separated by commas")
    return numbers


def measure(settings: Settings, device: torch.device, clock: Clock | None = None) -> tuple[list[Row], list[PeerRow]]:
    """Check and time everything that the settings select, and print results as they come."""
    import torch

    from griffin.tools.bench.kernels_operations import CHANNELS, TOLERANCE, Clock, copy_bandwidth

    dtype = getattr(torch, settings.dtype)
    clock = clock or Clock(device)
    if settings.peers:
        from griffin.tools.bench.kernels_peers import installed

        for package, version in installed().items():
            print(f"peer {package}: {version or f'not installed; pip install {package}'}")
    bandwidth = copy_bandwidth(clock, device, settings.copy_bytes, settings.repeats)
    print(
        f"copy of {settings.copy_bytes / GIB:.2f} GiB: {bandwidth / 1e9:,.0f} GB/s, read and written bytes counted\n"
        f"{settings.dtype}, time-major; medians of {settings.repeats} rounds of the device's own time, inputs not in "
        f"cache\nthe floor is each tensor read or written once, as fast as the copy; GB/s are the floor's bytes over "
        f"the time of forward and backward\nbefore it is timed, each result and gradient is compared with float64 on "
        f"{CHANNELS} channels: to {TOLERANCE[dtype]:.0e} of its largest value",
        flush=True,
    )
    rows = measure_ours(settings, device, clock, bandwidth)
    measured = {row.shape for row in rows if row.operation == "rglru"}
    peer_rows: list[PeerRow] = []
    if settings.peers:
        shapes = [shape for shape in settings.shapes() if shape in measured]
        _measure_peers(settings, device, clock, shapes, peer_rows)
    return rows, peer_rows


def measure_ours(settings: Settings, device: torch.device, clock: Clock, bandwidth: float) -> list[Row]:
    from griffin.kernels.recurrence.plan import select_plan
    from griffin.kernels.triton_launch import multiprocessors
    from griffin.tools.bench.kernels_operations import OPERATIONS

    rows = []
    for shape in settings.shapes():
        plan = select_plan(shape.steps, shape.batch, shape.width, multiprocessors(device), settings.chunk)
        print(f"\n{shape}: {plan.reason}\n{COLUMNS}", flush=True)
        path = "sequential" if plan.chunks == 1 else f"{plan.chunks} chunks of {plan.chunk}"
        for operation in OPERATIONS:
            times = _time_if_it_fits(operation, shape, settings, device, clock)
            if times is None:
                continue
            floor_bytes = operation.floor_bytes(shape, _element_size(settings))
            row = Row(operation.name, shape, path if operation.in_chunks else "", times, floor_bytes, bandwidth)
            rows.append(row)
            print(row, flush=True)
    return rows


def _time_if_it_fits(
    operation: Operation, shape: Shape, settings: Settings, device: torch.device, clock: Clock
) -> Times | None:
    """Check and time an operation. Prints a line and returns None if the device has too little memory."""
    import torch

    from griffin.tools.bench import kernels_operations as operations

    needed, free = operation.memory(shape, _element_size(settings)), operations.free_bytes(device)
    if needed > free:
        print(f"{operation.name:<16}skipped: needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")
        return None
    try:
        sets = operations.make_inputs(operation, shape, getattr(torch, settings.dtype), device)
        side = operations.our_implementation(operation, sets, settings.chunk)
        operations.check(f"{operation.name}, {shape}", side, operation, sets[0])
        return operations.time_implementations(clock, {"ours": side}, settings.repeats)["ours"]
    except torch.OutOfMemoryError:
        print(f"{operation.name:<16}skipped: {free / GIB:.1f} GiB of free memory are not enough")
        return None


def _element_size(settings: Settings) -> int:
    return 2 if settings.dtype == "bfloat16" else 4


def _measure_peers(
    settings: Settings, device: torch.device, clock: Clock, shapes: Sequence[Shape], rows: list[PeerRow]
) -> None:
    """Time the peers and append to `rows`."""
    from griffin.tools.bench.kernels_peers import load_peers

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

    from griffin.tools.bench import kernels_operations as operations
    from griffin.tools.bench.kernels_peers import describe, time_peer

    operation = operations.RGLRU_FROM_ZERO
    torch.compiler.reset()  # a function compiled for too many shapes would run uncompiled
    operations.free_bytes(device)
    try:
        sets = operations.make_inputs(operation, shape, getattr(torch, settings.dtype), device)
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

    from griffin.tools.bench.kernels_operations import free_bytes

    try:
        free_bytes(device)
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def summary(rows: Sequence[Row], peer_rows: Sequence[PeerRow], dtype: str) -> list[str]:
    """Return lines that compare the measurements with the goals."""
    lines = [f"\nrglru, forward and backward, {dtype}; the goals are for bfloat16 on an H200"]
    for least, goal in GOALS:
        over = sorted(
            (1 / row.share, str(row.shape)) for row in rows if row.operation == "rglru" and _is_as_wide(row, least)
        )
        title = f"time over the byte floor, B R >= {least}:"
        lines.append(
            f"{title} {over[0][0]:.2f} ({over[0][1]}) to {over[-1][0]:.2f} ({over[-1][1]}); goal: at most {goal:.2f}"
            if over
            else f"{title} not measured; goal: at most {goal:.2f}"
        )
    if peer_rows:
        least_ratio = min(peer_rows, key=lambda row: row.ratio)
        lines.append(
            f"fastest peer, smallest of all shapes: {least_ratio.ratio:.2f} times our time "
            f"({least_ratio.peer}; {least_ratio.shape})"
        )
    else:
        lines.append("fastest peer: not measured")
    return lines


def _is_as_wide(row: Row, least: int) -> bool:
    return row.shape.batch * row.shape.width >= least

"""`griffin bench kernels`: the operations of kernels/ on a GPU, beside what bounds them and beside peers."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from importlib.util import find_spec

from griffin.tools.bench.kernels import measure, plot, rows, settings
from griffin.tools.common.plots import require_new_plot


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "kernels",
        help="the kernels on a GPU, beside what bounds them and beside other scans",
        description="Time the RG-LRU, with and without its branch, and the convolution, forward and backward on one "
        "GPU, over many shapes. Print the bandwidth they reach and its share of a copy's, measured in the same run. "
        "Time every operation at the sizes of models' tensor-parallel ranks, beside the least time for what it moves "
        "and computes. Time the RG-LRU beside accelerated-scan, flash-linear-attention, transformers and torch's "
        "associative_scan, if installed. Every result and gradient is compared with float64 before it is timed; the "
        "exit code is 1 if one differs.",
    )
    settings.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    chosen = settings.read(args)
    if args.plot is not None:
        require_new_plot("--plot", args.plot, (".png",))

    import torch

    if not torch.cuda.is_available():
        raise ValueError("bench kernels: needs a CUDA device and a PyTorch built for it; torch finds none here")
    if find_spec("triton") is None:
        raise ValueError("bench kernels: needs the package triton; pip install triton")
    import triton

    if triton.knobs.runtime.interpret:
        raise ValueError("bench kernels: TRITON_INTERPRET=1 runs the kernels in Python; it must not be set")
    device = torch.device("cuda", torch.cuda.current_device())
    title = f"{torch.cuda.get_device_name(device)}, {chosen.dtype}"
    print(
        f"{time.strftime('%Y-%m-%d')}; {torch.cuda.get_device_name(device)}; python {platform.python_version()}, "
        f"torch {torch.__version__}, triton {triton.__version__}"
    )
    found = measure.measure(chosen, device)
    print("\n".join(rows.summary(found.rows, found.peers, chosen.dtype)))
    if args.plot is not None:
        plot.plot(found.rows, args.plot, title)
        print(f"{args.plot}: shares of the copy's bandwidth")
    for failure in found.failures:
        print(failure, file=sys.stderr)
    return 1 if found.failures else 0

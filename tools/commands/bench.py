"""`griffin bench`: the measurements of BENCHMARKS.md, each beside a peer in the same run."""

from __future__ import annotations

from typing import Any

from griffin.tools.bench import checkpoint, convert, count, generate, kernels, step


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench", help="measure speed beside a peer", description="Measure speed beside a peer in the same run."
    )
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    for kind in (step, checkpoint, convert, kernels, generate, count):
        kind.add_parser(kinds)

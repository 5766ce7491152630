"""`griffin monitor`: show the state of runs, live in a terminal, from their run folders."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from griffin.tools.runs.state import RunReader

WIDTH = 120  # without a terminal


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "monitor",
        help="watch runs in a terminal",
        description="Show the state of a run, or of several runs with a line each, until Ctrl-C. Only run folders are "
        "read, from any machine that sees them. If the output is not a terminal, show it once.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")
    parser.add_argument("--once", action="store_true", help="print the state once")
    parser.add_argument("--interval", metavar="SECONDS", type=float, default=2.0, help="between updates (default: 2)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from griffin.tools.runs.state import RunReader

    if not args.interval > 0:
        raise ValueError(f"--interval {args.interval}: must be above 0")
    readers = [RunReader(path) for path in args.runs]
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else WIDTH, highlight=False)
    if args.once or not terminal:
        console.print(show(readers, console))
        return 0
    try:
        with Live(show(readers, console), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(args.interval)
                live.update(show(readers, console), refresh=True)
    except KeyboardInterrupt:  # the way to leave it
        return 0


def show(readers: Sequence[RunReader], console: Console) -> RenderableType:
    """Render one run in full, or several with a line each, for the console's width and encoding."""
    from griffin.tools.runs.monitor_view import render_run, render_runs

    states = [reader.read() for reader in readers]
    if len(states) > 1:
        return render_runs(states)
    return render_run(states[0], blocks=console.encoding.startswith("utf"), width=console.width)

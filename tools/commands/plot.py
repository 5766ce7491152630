"""`griffin plot`: the curves of runs, as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SUFFIXES = (".svg", ".png")
FIGURES = ("loss", "tokens_per_second")
POINTS = 200


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plot",
        help="draw the curves of runs into an SVG or PNG file",
        description="Draws figures of metrics.jsonl: a panel for each figure and x axis, in it a curve for each run. "
        "Needs matplotlib: pip install 'griffin-megatron[bench]'.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="a new file, .svg or .png")
    parser.add_argument(
        "--figures",
        metavar="FIGURE",
        nargs="+",
        default=FIGURES,
        help=f"figures of metrics.jsonl (default: {' '.join(FIGURES)})",
    )
    parser.add_argument(
        "--over",
        choices=("tokens", "steps", "seconds"),
        nargs="+",
        default=["tokens"],
        help="x axes: tokens, optimizer steps, or seconds of training (default: tokens)",
    )
    parser.add_argument(
        "--points",
        metavar="N",
        type=int,
        default=POINTS,
        help=f"of a curve; of more logged steps, neighbours are averaged (default: {POINTS})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from griffin.tools.common.plots import require_new_plot
    from griffin.tools.runs.curves import read_curves
    from griffin.tools.runs.plot import plot

    if args.points < 2:
        raise ValueError(f"--points {args.points}: must be at least 2")
    require_new_plot("--out", args.out, SUFFIXES)
    figures, axes = (list(dict.fromkeys(names)) for names in (args.figures, args.over))
    runs = [read_curves(path, figures) for path in args.runs]
    for figure in figures:
        if not any(figure in curves.figures for curves in runs):
            known = sorted({name for curves in runs for name in (*curves.others, *curves.figures)})
            raise ValueError(f"--figures {figure}: no run has it; they have {', '.join(known) or 'no figures'}")
    plot(runs, [(figure, axis) for figure in figures for axis in axes], args.out, args.points)
    print(f"{args.out}: {', '.join(figures)} of {len(runs)} {'run' if len(runs) == 1 else 'runs'}")

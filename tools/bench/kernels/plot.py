"""The plot of `griffin bench kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from griffin.tools.bench.kernels.rows import Row


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Plot the share of the copy's bandwidth over R to a new PNG: a panel per operation, a line per T and B."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.operation for row in rows)) or ["nothing measured"]
    figure = Figure(figsize=(5 * len(names), 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: forward and backward\nshare of the copy's bandwidth (1: the byte floor)")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    lengths = sorted({row.shape.steps for row in rows})
    batches = sorted({row.shape.batch for row in rows})
    widths = sorted({row.shape.width for row in rows})
    for panel, name in zip(panels, names, strict=True):
        for steps in lengths:
            for batch in batches:
                points = sorted(
                    (row.shape.width, row.share)
                    for row in rows
                    if (row.operation, row.shape.steps, row.shape.batch) == (name, steps, batch)
                )
                if points:
                    panel.plot(
                        *zip(*points, strict=True),
                        color=f"C{lengths.index(steps) % 10}",
                        linestyle=("-", "--", ":", "-.")[batches.index(batch) % 4],
                        marker="o",
                        markersize=4,
                        label=f"T {steps}, B {batch}",
                    )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(title=name, xlabel="R (channels)", ylim=(0, None))
        panel.set_xscale("log", base=2)
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of the copy's bandwidth")
    if rows:
        panels[-1].legend(fontsize="small")
    with open(path, "xb") as file:
        figure.savefig(file, format="png")

"""The plot of `griffin plot`: in each panel a curve for each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from griffin.tools.runs.curves import Curves, thin

UNITS = {
    "loss": "nats per token",
    "eval_loss": "nats per token",
    "eval_bits_per_byte": "bits",
    "tokens_per_second": "",
    "model_tflops_per_device": "TFLOP/s",
    "checkpoint_bytes": "bytes",
}
SUFFIXES = {"_seconds": "s", "_gib": "GiB"}
FROM_ZERO = ("_per_second", "_seconds", "_gib", "mfu", "_per_device", "goodput")  # a share of these means something
TITLES = {"tokens": "tokens", "steps": "optimizer steps", "seconds": "training time (s)"}


def plot(runs: Sequence[Curves], panels: Sequence[tuple[str, str]], path: Path, points: int) -> None:
    """Draw the runs' curves into a new SVG or PNG file, on white: a panel for each (figure, axis)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    picture = Figure(figsize=(4.8 * len(panels), 3.4), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)
    places = picture.subplots(1, len(panels), squeeze=False)[0]
    for place, (figure, axis) in zip(places, panels, strict=True):
        for number, run in enumerate(runs):
            if figure in run.figures:
                curve = thin(run.over(figure, axis), points)
                place.plot(*curve, color=f"C{number % 10}", linewidth=1.4, label=name_of(run, runs))
        place.set(xlabel=TITLES[axis], ylabel=label(figure))
        place.xaxis.set_major_formatter(EngFormatter(sep=""))
        if figure.endswith(FROM_ZERO):
            place.set_ylim(bottom=0)
        place.grid(alpha=0.3)
        place.spines[["top", "right"]].set_visible(False)
        place.legend(frameon=False)
    metadata = {"Date": None, "Creator": "griffin plot"} if path.suffix == ".svg" else {"Software": "griffin plot"}
    # The same runs give the same file: no random ids, no date. Glyphs are drawn, so that no font is needed.
    with rc_context({"svg.hashsalt": "griffin", "svg.fonttype": "path"}), open(path, "xb") as file:
        picture.savefig(file, format=path.suffix[1:], metadata=metadata)


def label(figure: str) -> str:
    """A figure's name as the title of an axis, with its unit: "loss (nats per token)"."""
    name = figure.partition("/")[0]
    unit = UNITS.get(name, next((unit for suffix, unit in SUFFIXES.items() if name.endswith(suffix)), ""))
    stem = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
    words = figure.replace(name, stem, 1).replace("_", " ")
    return f"{words} ({unit})" if unit else words


def name_of(run: Curves, runs: Sequence[Curves]) -> str:
    """The name of a run's folder; all of its path where another run has that name too."""
    name = run.path.resolve().name
    return name if [each.path.resolve().name for each in runs].count(name) == 1 else str(run.path)

"""Render the state of runs for `griffin monitor`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from griffin.tools.runs.state import FAILED, FINISHED, GONE, HUNG, RUNNING, SILENT, RunState, duration
from griffin.trainer.reporting.metrics import NOTHING_PREDICTED, is_predicted

COLOURS = {RUNNING: "green", FINISHED: "green", SILENT: "yellow", HUNG: "red", GONE: "red", FAILED: "red"}
BLOCKS = "▁▂▃▄▅▆▇█"
SPARKS = 60  # number of losses drawn
MOST_TIME = 2.0**35  # largest Unix time shown, in the year 3058
WIDE = 100  # columns needed for two columns of figures
ABSENT = "-"
SPIKES = {"skipped_updates": "{:.0f} skipped", "rewinds": "{:.0f} rewound"}
HELD_OUT = {
    "eval_perplexity": "perplexity {:.3f}",
    "eval_bits_per_byte": "{:.4f} bits per byte",
}
PARTS = {"forward-backward": "forward_backward", "optimizer": "optimizer", "data wait": "data_wait", "rest": "other"}


def render_run(state: RunState, *, blocks: bool = True, width: int = WIDE) -> RenderableType:
    """Render everything about a run for a terminal of `width` columns; `blocks`: draw losses in block characters."""
    figures = Table.grid(padding=(0, 3))
    training, machine = _training(state, blocks), _machine(state)
    columns = (training, machine) if width >= WIDE else ([*training, *machine],)
    for _ in columns:
        figures.add_column(style="bold", no_wrap=True)
        figures.add_column(overflow="fold")
    for place in range(max(map(len, columns))):
        row = [pair for column in columns for pair in (column[place] if place < len(column) else ("", ""))]
        figures.add_row(*map(Text, row))
    bar = Table.grid(expand=True)
    bar.add_row(ProgressBar(total=max(state.steps, 1), completed=state.step))
    parts: list[RenderableType] = [_head(state), bar, figures]
    parts += _events(state)
    if layers := _layers(state):  # last: a terminal may not have as many lines as a model has layers
        parts.append(layers)
    return Group(*parts)


def render_runs(states: Sequence[RunState]) -> Table:
    """Render one line per run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "state", "step", "left", "loss", "eval", "tokens/s", "MFU", "goodput", "restarts"):
        is_run = title == "run"  # the column that is folded on a narrow terminal
        table.add_column(title, justify="left" if is_run or title == "state" else "right", no_wrap=not is_run)
    for state in states:
        figure = _FigureText(state.figures)
        table.add_row(
            Text(str(state.path), overflow="fold"),
            Text(state.status, COLOURS.get(state.status, "")),
            f"{state.step:,}/{state.steps:,}",
            _left(state),
            figure("loss", "{:.4f}".format),
            " ".join(figure(f"eval_loss{name and '/'}{name}", "{:.4f}".format) for name in held_out_sets(state)),
            figure("tokens_per_second", "{:,.0f}".format),
            figure("mfu", "{:.1%}".format),
            figure("goodput", "{:.1%}".format),
            str(state.attempt - 1),
        )
    return table


class _FigureText:
    """Formats figures by name; missing ones and those that were not finite are shown as such."""

    def __init__(self, figures: Mapping[str, float]):
        self._figures = figures

    def __call__(self, name: str, format_value: Callable[[float], str]) -> str:
        if name not in self._figures:
            return ABSENT
        value = self._figures[name]
        if not is_predicted(name, self._figures):
            return NOTHING_PREDICTED
        return "not finite" if value is None else format_value(value)


def _head(state: RunState) -> Text:
    text = Text.assemble((str(state.path), "bold"), "  ", (state.status, f"bold {COLOURS.get(state.status, '')}"))
    if state.detail:
        text.append(f" ({state.detail})")
    share = f" ({state.step / state.steps:.1%})" if state.steps else ""
    text.append(f"\nstep {state.step:,} of {state.steps:,}{share}, attempt {state.attempt}")
    if state.status in (RUNNING, SILENT):
        text.append(f", {_left(state)} left")
    return text


def _left(state: RunState) -> str:
    seconds = state.seconds_left
    return ABSENT if seconds is None or state.status == FINISHED else duration(seconds)


def _training(state: RunState, blocks: bool) -> list[tuple[str, str]]:
    figure = _FigureText(state.figures)
    kinds = [
        f"{name.partition('/')[2]} {value:.3g}"
        for name, value in state.figures.items()
        if name.startswith("grad_norm/") and value is not None
    ]
    rows = [
        ("loss", figure("loss", "{:.4f} nats per token".format)),
        ("", sparkline([loss for _, loss in state.losses][-SPARKS:]) if blocks else ""),
        *_held_out(state),
        ("gradient norm", figure("grad_norm", "{:.3g}".format)),
        ("", ", ".join(kinds)),
        ("parameter norm", figure("param_norm", "{:.4g}".format)),
        ("learning rate", figure("learning_rate", "{:.3g}".format)),
        ("tokens", figure("tokens", "{:,.0f}".format)),
    ]
    return [row for row in rows if any(row)]


def held_out_sets(state: RunState) -> list[str]:
    """Return the names of held-out sets that have a loss; "" is the unnamed one, and returned if there is none yet."""
    names = [name.removeprefix("eval_loss/") for name in state.figures if name.startswith("eval_loss/")]
    return names if names and "eval_loss" not in state.figures else ["", *names]


def _held_out(state: RunState) -> list[tuple[str, str]]:
    """Return the rows for each held-out set."""
    figure = _FigureText(state.figures)
    at = f" at step {state.evaluation:,}" if state.evaluation is not None else ""
    rows = []
    for name in held_out_sets(state):
        rows.append((f"held-out {name or 'loss'}", figure(f"eval_loss{name and '/'}{name}", "{:.4f}".format) + at))
        keys = {f"{figure}/{name}": form for figure, form in HELD_OUT.items()}
        known = [key for key in keys if key in state.figures and is_predicted(key, state.figures)]
        if known:
            rows.append(("", ", ".join(figure(key, keys[key].format) for key in known)))
    return rows


def _machine(state: RunState) -> list[tuple[str, str]]:
    figure = _FigureText(state.figures)
    step = state.figures.get("step_seconds")
    shares = [
        f"{title} {value / step:.0%}"
        for title, name in PARTS.items()
        if step and (value := state.figures.get(f"{name}_seconds")) is not None
    ]
    memory = ", ".join(
        figure(f"memory_{name}_gib", f"{name} {{:.2f}}".format)
        for name in ("allocated", "reserved", "peak")
        if f"memory_{name}_gib" in state.figures
    )
    checkpoint = ABSENT
    if state.checkpoint is not None:
        checkpoint = f"step {state.checkpoint[0]:,}, {duration(state.checkpoint[1])} ago"
    if "checkpoint_stall_seconds" in state.figures:
        checkpoint += figure("checkpoint_stall_seconds", "; stalled {:.2g} s".format)
    return [
        ("speed", figure("tokens_per_second", "{:,.0f} tokens/s".format)),
        (
            "per device",
            figure("model_tflops_per_device", "{:.3g} TFLOP/s, MFU ".format) + figure("mfu", "{:.1%}".format),
        ),
        ("step time", figure("step_seconds", "{:.3g} s".format) + (f": {', '.join(shares)}" if shares else "")),
        ("pipeline bubble", figure("pipeline_bubble", "{:.1%}".format)),
        ("slowest replica", figure("data_parallel_imbalance", "{:.2f} x the mean".format)),
        ("memory (GiB)", memory or ABSENT),
        ("goodput", figure("goodput", "{:.1%}".format)),
        ("restarts", str(state.attempt - 1)),
        ("spikes", ", ".join(figure(name, form.format) for name, form in SPIKES.items())),
        ("checkpoint", checkpoint),
    ]


def _layers(state: RunState) -> Table | None:
    """Return a table of the RG-LRU's figures: one row per recurrent layer and one for all."""
    names = sorted({name.split("/")[2] for name in state.figures if name.startswith("rglru/")})
    if not names:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title_style="bold")
    table.title = "RG-LRU: memory length in tokens, decay, and shares of gates that are closed and open"
    titles = ("layer", "memory 5 %", "50 %", "95 %", "mean decay", "input closed", "open", "recurrence closed", "open")
    for title in titles:
        table.add_column(title, justify="left" if title == "layer" else "right")
    figure = _FigureText(state.figures)
    shares = [f"{gate}_{end}" for gate in ("input_gate", "recurrence_gate") for end in ("closed", "open")]
    for name in names:
        table.add_row(
            name,
            *(figure(f"rglru/memory_{quantile}/{name}", "{:,.3g}".format) for quantile in ("p05", "p50", "p95")),
            figure(f"rglru/decay_mean/{name}", "{:.4f}".format),
            *(figure(f"rglru/{share}/{name}", "{:.1%}".format) for share in shares),
        )
    return table


def _events(state: RunState) -> list[Text]:
    lines: list[Text] = []
    if state.hangs:
        lines.append(Text(f"Hangs: {len(state.hangs)}, the last {state.hangs[-1]}", "bold"))
        lines += [Text(line, "red") for line in state.hang]
    if slow := _stragglers(state.stragglers):
        lines.append(Text.assemble(("Slowest: ", "bold"), slow))
    if state.events:
        lines.append(Text("Ledger", "bold"))
        lines += [Text(_event(event)) for event in state.events]
    if state.last_line:
        lines.append(Text.assemble(("Console: ", "bold"), state.last_line))
    return lines


def _event(event: Mapping[str, object]) -> str:
    when = event.get("time")
    date = ""
    if isinstance(when, float) and 0 <= when < MOST_TIME:
        date = time.strftime("%m-%d %H:%M", time.localtime(when))
    words = [str(event[key]) for key in ("kind", "action") if key in event]
    rest = [f"{key} {value}" for key, value in event.items() if key not in ("time", "step", "kind", "action")]
    return f"{date} step {event.get('step', ABSENT)}: {', '.join([*words, *rest])}"


def _stragglers(found: Mapping[str, object]) -> str:
    """Return the slowest hosts and ranks of the run's last report."""

    def slowest(key: str, name: Callable[[Mapping[str, object]], str]) -> Iterable[str]:
        rows = found.get(key)
        known = (
            [row for row in rows if isinstance(row, dict) and isinstance(row.get("ratio"), float)]
            if isinstance(rows, list)
            else []
        )
        for row in sorted(known, key=lambda row: -row["ratio"])[:3]:
            yield f"{name(row)} {row['ratio']:.2f} x"

    hosts = slowest("hosts", lambda row: f"{row.get('host')}")
    ranks = slowest("ranks", lambda row: f"rank {row.get('rank')}")
    return ", ".join([*hosts, *ranks])


def sparkline(values: Sequence[float]) -> str:
    """Draw one block character per finite value, scaled from their minimum to their maximum."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in finite)

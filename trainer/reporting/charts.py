"""Layout of a run in TensorBoard: groups of figures, and the pages of custom scalars."""

from __future__ import annotations

from collections.abc import Callable

# Group -> names of figures up to their first slash. TensorBoard sorts groups by name; the numbers put the loss first.
_GROUPS = {
    "1_loss": ("loss", "eval_loss", "eval_perplexity", "eval_bits_per_byte"),
    "2_optimizer": ("grad_norm", "param_norm", "learning_rate", "skipped_updates", "rewinds"),
    "3_speed": (
        "tokens_per_second",
        "mfu",
        "model_tflops_per_device",
        "step_seconds",
        "forward_backward_seconds",
        "optimizer_seconds",
        "data_wait_seconds",
        "other_seconds",
        "pipeline_bubble",
        "data_parallel_imbalance",
    ),
    "4_memory": ("memory_allocated_gib", "memory_reserved_gib", "memory_peak_gib"),
    "5_rglru": ("rglru",),
    "6_run": (
        "tokens",
        "loss_tokens",
        "eval_loss_tokens",
        "goodput",
        "trained_seconds",
        "restarts",
        "checkpoint_stall_seconds",
        "checkpoint_seconds",
        "checkpoint_bytes",
    ),
}
_GROUP_OF = {figure: group for group, figures in _GROUPS.items() for figure in figures}
OTHERS = "7_other"
# Category -> chart -> regular expressions of its figures, literal up to their first slash.
_HELD_OUT_SETS = {  # replace the charts of the same titles if held-out sets have names
    "Loss (nats per token)": ["loss", "eval_loss/.*"],
    "Perplexity": ["eval_perplexity/.*"],
    "Bits per byte": ["eval_bits_per_byte/.*"],
}
_CHARTS = {
    "Run": {
        "Loss (nats per token)": ["loss", "eval_loss"],
        "Tokens per second": ["tokens_per_second"],
        "MFU": ["mfu"],
        "Step time (seconds)": [
            "step_seconds",
            "forward_backward_seconds",
            "optimizer_seconds",
            "data_wait_seconds",
            "other_seconds",
        ],
        "Gradient norms": ["grad_norm", "grad_norm/.*"],
        "Parameter norm": ["param_norm"],
        "Learning rate": ["learning_rate"],
        "Memory of the fullest rank (GiB)": ["memory_allocated_gib", "memory_reserved_gib", "memory_peak_gib"],
        "Goodput": ["goodput"],
        "Restarts, skipped updates and rewinds": ["restarts", "skipped_updates", "rewinds"],
        "Checkpoints (seconds)": ["checkpoint_stall_seconds", "checkpoint_seconds"],
        "Waiting for other ranks": ["pipeline_bubble", "data_parallel_imbalance"],
        "RG-LRU: memory length (tokens)": ["rglru/memory_.*/all"],
        "RG-LRU: saturated gates": ["rglru/.*_(closed|open)/all"],
    },
    "RG-LRU by layer": {
        "Median memory length (tokens)": ["rglru/memory_p50/layer-.*"],
        "Long memory: 95 % (tokens)": ["rglru/memory_p95/layer-.*"],
        "Mean decay": ["rglru/decay_mean/layer-.*"],
        "Closed recurrence gates": ["rglru/recurrence_gate_closed/layer-.*"],
        "Open recurrence gates": ["rglru/recurrence_gate_open/layer-.*"],
        "Closed input gates": ["rglru/input_gate_closed/layer-.*"],
        "Open input gates": ["rglru/input_gate_open/layer-.*"],
    },
}


def grouped(figure: str) -> str:
    """A figure's tag, GROUP/FIGURE. The name of the group is not repeated in the figure."""
    group = _GROUP_OF.get(figure.split("/")[0], OTHERS)
    return f"{group}/{figure.removeprefix(group[2:] + '/')}"


def layout(tag: Callable[[str], str] = grouped, *, named_sets: bool = False) -> dict[str, dict[str, list]]:
    """The layout for SummaryWriter.add_custom_scalars; `named_sets` if held-out sets have names."""
    pages = _CHARTS | {"Run": _CHARTS["Run"] | (_HELD_OUT_SETS if named_sets else {})}
    return {
        category: {
            title: ["Multiline", [f"^{tag(figure)}$" for figure in figures]] for title, figures in charts.items()
        }
        for category, charts in pages.items()
    }

"""The first page of TensorBoard's custom scalars: what state a run is in."""

from __future__ import annotations

# Category -> chart -> regular expressions of its tags.
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


def layout() -> dict[str, dict[str, list]]:
    """For SummaryWriter.add_custom_scalars."""
    return {
        category: {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in charts.items()}
        for category, charts in _CHARTS.items()
    }

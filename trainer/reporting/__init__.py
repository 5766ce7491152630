"""Reporting of a run: console, metrics.jsonl, TensorBoard and goodput."""

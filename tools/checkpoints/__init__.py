"""Inspect, compare, plan, reshard and average checkpoints."""

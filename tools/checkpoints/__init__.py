"""Checkpoints for people: report, plan, reshard, average."""

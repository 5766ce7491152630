"""Saving processes: checkpoints are written while the training goes on."""

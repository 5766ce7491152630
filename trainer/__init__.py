"""A training run: settings, data, training loop, optimizer, checkpoints, health and reporting."""

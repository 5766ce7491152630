"""Training: configuration, data, step, optimizer, loop, metrics."""

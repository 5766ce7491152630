"""Measurements of a training step: time, norms, memory, peak FLOP/s and the RG-LRU's gates."""

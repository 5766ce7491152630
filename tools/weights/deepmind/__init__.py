"""Read DeepMind's RecurrentGemma weights: PyTorch files and orbax folders (Flax)."""

"""DeepMind's Griffin checkpoints."""

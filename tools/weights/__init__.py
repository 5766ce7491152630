"""Convert weights of transformers and DeepMind to checkpoints, and export checkpoints to transformers."""

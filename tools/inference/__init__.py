"""Generation from checkpoints."""

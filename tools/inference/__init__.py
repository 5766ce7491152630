"""Run a checkpoint's model: load it on tensor ranks, prepare prompts, generate tokens."""

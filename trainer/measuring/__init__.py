"""What is measured of a training step."""

"""Sharded Zarr checkpoints that no parallel layout shows in."""

"""Layout-independent sharded Zarr checkpoints: the format, saving and loading them, and the steps of a run."""

"""Model parallelism: the rank grid, the sharded mixers, the pipeline stage and the sharding of every parameter."""

import warnings

# Every run records which optimizer and norm it uses; megatron-core would also say it on every process, four times.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

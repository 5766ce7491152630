"""Model parallelism: the rank grid, the sharded mixers, the pipeline stage and the sharding of every parameter."""

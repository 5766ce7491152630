"""Model parallelism: the rank grid, the sharded mixers, the pipeline stage and the sharding of every parameter."""

import warnings

# megatron-core warns, on every process, of optional packages that it misses (a run records what it uses instead), of
# its own deprecated settings at their defaults, and calls collectives by names that PyTorch has renamed.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

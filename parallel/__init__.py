"""Model parallelism: the rank grid, the sharded mixers, the pipeline stage and the sharding of every parameter."""

import warnings

# On every process, megatron-core warns about missing optional packages (a run records the implementations in use) and
# about its own deprecated settings at their defaults. It also calls collectives by names that PyTorch has deprecated.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

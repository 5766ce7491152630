
# --- GPUs and their network ---
# NCCL finds InfiniBand and the GPUs' order by itself; of its trouble it should speak.
export NCCL_DEBUG=WARN
# Where a node has several kinds of adapters: those for the traffic of ranks, here all that begin with mlx5.
#export NCCL_IB_HCA=mlx5
# The network interface by which NCCL's ranks first meet; needed where the first one found leads nowhere, docker0 for one.
#export NCCL_SOCKET_IFNAME=ib0
# The time that InfiniBand waits before it sends again is 4 us x 2^value (default 20): larger survives a rerouted fabric.
#export NCCL_IB_TIMEOUT=22
# Says which transport every pair of ranks uses: where bandwidth is low, look for "NET/Socket" in place of "NET/IB".
#export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
# Compiled kernels go to the node's own disk: hundreds of ranks would rename files over each other on a shared one.
TRITON_CACHE_DIR=${TMPDIR:-/tmp}/griffin-triton-$(id -un)
export TRITON_CACHE_DIR

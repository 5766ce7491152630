
# --- GPUs and their network ---
# NCCL detects InfiniBand and the GPU topology by itself. Print its warnings:
export NCCL_DEBUG=WARN
# If a node has several kinds of adapters: those to use between ranks, here all whose names begin with mlx5.
#export NCCL_IB_HCA=mlx5
# The network interface for NCCL's bootstrap; needed if the first one that it finds is not routed, such as docker0.
#export NCCL_SOCKET_IFNAME=ib0
# InfiniBand's retransmission timeout is 4 us x 2^value (default 20): a larger value survives rerouting of the fabric.
#export NCCL_IB_TIMEOUT=22
# Prints the transport between each pair of ranks: if bandwidth is low, look for "NET/Socket" instead of "NET/IB".
#export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
# Compiled kernels go to the node's local disk: on a shared one, hundreds of ranks would overwrite each other's files.
TRITON_CACHE_DIR=${TMPDIR:-/tmp}/griffin-triton-$(id -un)
export TRITON_CACHE_DIR

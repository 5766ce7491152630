"""Assumed rates of devices, and the time of an operator at them. None of them is a measurement of this project."""

from __future__ import annotations

import math
from dataclasses import dataclass

from griffin.kernels.costs import Product
from griffin.tools.bench.count.recorder import Op


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU in its node; see ASSUMPTIONS for where the figures come from."""

    name: str
    peak: float = 989.4e12  # FLOP/s, dense bfloat16, by which MFU is measured
    products: float = 790e12  # FLOP/s of a large matrix product
    attention: float = 420e12  # FLOP/s of FlexAttention on the blocks that it visits, head dim 128
    attention_backward: float = 300e12
    bandwidth: float  # bytes/s that a copy reaches
    memory: float  # bytes that PyTorch can have
    multiprocessors: int = 132
    kernel: float = 3e-6  # s between two kernels
    node: int = 8  # GPUs
    node_link: float = 300e9  # bytes/s of an all-gather within a node
    node_latency: float = 15e-6  # s of a collective
    network: float = 45e9  # bytes/s of a GPU to other nodes


DEVICES = {
    "h100": Device(name="H100 SXM 80 GB", bandwidth=3.0e12, memory=77.6e9),
    "h200": Device(name="H200 SXM 141 GB", bandwidth=4.3e12, memory=136.8e9),
}

ASSUMPTIONS = (
    ("peak of dense bfloat16, for MFU", "989.4 TFLOP/s", "NVIDIA's data sheets of H100 and H200 SXM"),
    ("a large matrix product", "790 TFLOP/s", "published cuBLAS figures of 700 to 800; --gemm 680 is the cautious one"),
    ("FlexAttention, head dim 128", "420, backward 300 TFLOP/s", "PyTorch's published figures; 0.75 of it above 128"),
    ("memory", "3.0 TB/s on H100, 4.3 on H200", "90 % of the data sheets' bandwidth"),
    ("share of that bandwidth", "0.75 to 0.95 by class", "usual figures of such kernels"),
    ("between two kernels", "3 us", "usual figure on Hopper with an asynchronous host"),
    ("collective within a node", "300 GB/s + 15 us", "NCCL's bus bandwidth at 40 to 100 MB"),
    ("network", "45 GB/s a GPU", "InfiniBand NDR, 400 Gbit/s a GPU, 90 % of it"),
    ("a collective beside a product", "slows it by 15 %", "multiprocessors and bandwidth that NCCL takes"),
    ("a collective in pieces beside its product", "a third stays exposed", "its first piece, and smaller products"),
)

# The part of a copy's bandwidth that a class of kernels reaches.
_SHARE = {
    "elementwise": 0.95,
    "casts and copies": 0.85,
    "reductions": 0.75,
    "norm": 0.85,
    "scan": 0.75,
    "convolution": 0.80,
    "loss": 0.85,
    "embedding": 0.6,
    "gradient accumulation": 0.9,
    "products": 0.9,
    "attention": 1.0,
    "attention backward": 1.0,
}
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.88), (128, 64, 0.7), (64, 64, 0.45))  # and their efficiency
EXPOSED = 1 / 3  # of the time of a collective that runs in pieces beside its own products
BESIDE = 0.15  # of a collective's time is added to the product beside which it runs


def product_efficiency(product: Product, multiprocessors: int) -> float:
    """Part of the rate of a large product: idle multiprocessors of the last wave, and the start of short loops over K.

    Of the best of a few tiles; K may be split, at the cost of partial sums.
    """
    best = 0.0
    for tile_m, tile_n, efficiency in _TILES:
        tiles = product.batch * math.ceil(product.m / tile_m) * math.ceil(product.n / tile_n)
        filled = product.batch * product.m * product.n / (tiles * tile_m * tile_n)
        for split, cost in ((1, 1.0), (2, 0.93), (4, 0.93)):
            waves = tiles * split / multiprocessors
            length = product.k / split
            best = max(best, efficiency * filled * waves / math.ceil(waves) * length / (length + 192) * cost)
    return best


def seconds(op: Op, device: Device) -> float:
    """Return the time of an operator by itself."""
    if op.collective is not None:
        return collective_seconds(op.collective.kind, op.collective.bytes, op.collective.size, device)
    moving = op.bytes / (_SHARE[op.kind] * device.bandwidth)
    computing = 0.0
    if op.product is not None:
        computing = op.flops / (device.products * product_efficiency(op.product, device.multiprocessors))
    elif op.flops:
        rate = device.attention_backward if op.kind == "attention backward" else device.attention
        computing = op.flops / (rate * op.balance)
    return max(moving, computing) + op.kernels * device.kernel


def collective_seconds(kind: str, size_bytes: float, ranks: int, device: Device) -> float:
    """Return the time of a ring within a node, or over the network if the group is larger than a node."""
    moved = size_bytes * (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)
    return moved / (device.node_link if ranks <= device.node else device.network) + device.node_latency

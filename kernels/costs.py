"""Costs of the custom operators on a GPU: FLOPs of matrix products, bytes moved to and from memory, kernels.

Each operator states its cost beside its code, as a function of its arguments. `griffin bench count` adds them up; for
PyTorch's own operators it counts every input and output once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NAMESPACE = "griffin"


@dataclass(frozen=True, kw_only=True)
class Product:
    """Shape of `batch` matrix products [M, K] x [K, N]."""

    batch: int = 1
    m: int
    n: int
    k: int

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True, kw_only=True)
class OperatorCost:
    """Cost of one call.

    kind: the class of kernels that it counts to, such as "scan".
    flops: of matrix products. `product` is their shape where there is one for all.
    balance: the mean over the longest time of the device's multiprocessors.
    """

    kind: str
    bytes: float
    kernels: int
    flops: float = 0.0
    product: Product | None = None
    balance: float = 1.0


# By qualified name, such as "griffin::rglru": functions of an operator's arguments in order and its results.
COSTS: dict[str, Callable[[tuple[Any, ...], tuple[Tensor, ...]], OperatorCost]] = {}


def states_cost(operator: Any) -> Callable[[Callable[..., OperatorCost]], Callable[..., OperatorCost]]:
    """Return a decorator for the function that states the cost of this `torch.library.custom_op`."""

    def register(cost: Callable[..., OperatorCost]) -> Callable[..., OperatorCost]:
        COSTS[operator._qualname] = cost
        return cost

    return register


def touched(tensors: Iterable[Any]) -> int:
    """Return the bytes of the tensors among these, each read or written once; an expanded axis counts once."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            count = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                count *= size if stride else min(size, 1)
            total += count * tensor.element_size()
    return total

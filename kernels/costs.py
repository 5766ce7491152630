"""What the custom operators cost on a GPU: FLOPs of matrix products, bytes moved to and from memory, kernels started.

Each operator states its cost beside its code, from its arguments alone. `griffin bench count` adds these up, where for
PyTorch's own operators it counts every input and output once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NAMESPACE = "griffin"


@dataclass(frozen=True, kw_only=True)
class OperatorCost:
    """Of one call. `kind` is the class of kernels that it counts to, such as "scan"."""

    kind: str
    bytes: float
    kernels: int
    flops: float = 0.0


# By qualified name, "griffin::rglru". A cost is asked for with an operator's arguments in order and its results.
COSTS: dict[str, Callable[[tuple[Any, ...], tuple[Tensor, ...]], OperatorCost]] = {}


def states_cost(operator: Any) -> Callable[[Callable[..., OperatorCost]], Callable[..., OperatorCost]]:
    """Decorator: the function states the cost of this `torch.library.custom_op`."""

    def register(cost: Callable[..., OperatorCost]) -> Callable[..., OperatorCost]:
        COSTS[operator._qualname] = cost
        return cost

    return register


def touched(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among them, each read or written once; an expanded axis counts once."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            count = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                count *= size if stride else min(size, 1)
            total += count * tensor.element_size()
    return total

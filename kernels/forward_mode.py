"""Refusal of forward-mode differentiation by operators that have no formula for it and would drop tangents silently."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function, forward_ad


class _NoTangent(Function):
    """The tensor itself. Reached through any order of jvp and vmap, where a look at the tensor might see no tangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        raise NotImplementedError(
            'forward-mode differentiation (torch.func.jvp, jacfwd, hessian): only backend="reference" has it'
        )


def without_tangents(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, floating-point ones or None.

    Raises:
        NotImplementedError: forward-mode differentiation is on and one of them has a tangent.
    """
    if forward_ad._current_level < 0:  # outside of it nothing is added to graphs
        return tensors
    return tuple(None if tensor is None else _NoTangent.apply(tensor) for tensor in tensors)

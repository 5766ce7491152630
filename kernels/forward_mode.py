"""Raises an error for forward-mode differentiation of operators without a JVP, which would drop tangents silently."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function, forward_ad


class _NoTangent(Function):
    """The identity, with a JVP that raises.

    It catches tangents under any nesting of jvp and vmap, where inspecting the tensor may show none.
    """

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
    """Return the tensors, each floating-point or None, unchanged.

    Raises:
        NotImplementedError: one of them has a tangent of forward-mode differentiation.
    """
    if forward_ad._current_level < 0:  # not in forward mode: add nothing to the graph
        return tensors
    return tuple(None if tensor is None else _NoTangent.apply(tensor) for tensor in tensors)

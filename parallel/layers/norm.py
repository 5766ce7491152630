"""RMSNorm of the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from griffin.kernels.rms_norm import EPSILON, add_rms_norm, rms_norm
from griffin.parallel.context import Context
from griffin.parallel.layers.linear import Branch, LayerStep
from griffin.parallel.layers.recompute import recomputed
from griffin.parallel.sharding import Piece, describe, zeros


class RMSNorm(nn.Module):
    """Compute `x * rsqrt(mean(x^2) + 1e-6) * (1 + w)` over the last axis of x [..., D], in float32.

    The output has the dtype of x. With `recompute` the product that it is given to computes it again in the backward
    pass instead of keeping it.
    """

    def __init__(self, name: str, context: Context, *, recompute: bool = False):
        super().__init__()
        width = context.model.width
        self.kernels, self.recompute = context.kernels, recompute
        self.weight = context.parameter(width)
        describe(
            self.weight,
            Piece(name=f"{name}.weight", shape=(width,), init=zeros),
            weight_decay=False,
            sequence_parallel=True,
        )

    def forward(self, x: Tensor, branch: Branch | None = None) -> tuple[Tensor, Tensor]:
        """Return the sum of x and a branch, or x itself, and the norm of that."""
        options: dict[str, Any] = {"epsilon": EPSILON, "backend": self.kernels}
        if branch is None:
            total, y = x, rms_norm(x, self.weight, **options)
        else:
            total, y = add_rms_norm(x, branch.value, self.weight, branch.bias, **options)
        if self.recompute:
            kept = total.detach()
            y = recomputed(y, lambda: rms_norm(kept, self.weight.detach(), **options))
        return total, y

    def stepper(self) -> LayerStep:
        """Return the norm for one token, x [D, B], with the current weight."""
        scale = (1.0 + self.weight.float())[:, None]

        def step(x: Tensor) -> Tensor:
            wide = x.float()
            return (wide * wide.square().mean(0).add_(EPSILON).rsqrt_()).mul_(scale).to(x.dtype)

        return step

"""RMSNorm, by Apex's fused kernel where NVIDIA's Apex can be imported and by PyTorch elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from griffin.parallel.context import Context
from griffin.parallel.linear import LayerStep
from griffin.parallel.sharding import Piece, describe, zeros

EPSILON = 1e-6


def apex_rms_norm() -> Callable[..., Tensor] | None:
    """Apex's RMSNorm for a float32 weight and any input dtype; None where NVIDIA's Apex is absent.

    A package of the name `apex` that is not NVIDIA's has no such function; a build of NVIDIA's without its compiled
    extensions, which is the default, has it and fails when it is called.
    """
    if not torch.cuda.is_available():
        return None
    try:
        importlib.import_module("fused_layer_norm_cuda")
        return importlib.import_module("apex.normalization.fused_layer_norm").mixed_dtype_fused_rms_norm_affine
    except (ImportError, AttributeError):
        return None


class RMSNorm(nn.Module):
    """`x * rsqrt(mean(x^2) + 1e-6) * (1 + w)` in float32, over the last axis of x [..., D]; output in x's dtype."""

    def __init__(self, name: str, context: Context):
        super().__init__()
        width = context.model.width
        self.weight = context.parameter(width)
        self._fused = apex_rms_norm()
        describe(
            self.weight,
            Piece(name=f"{name}.weight", shape=(width,), init=zeros),
            weight_decay=False,
            sequence_parallel=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + self.weight.float()
        if self._fused is not None:
            return self._fused(x, scale, scale.shape, EPSILON).to(x.dtype)
        return F.rms_norm(x.float(), scale.shape, scale, EPSILON).to(x.dtype)

    def stepper(self) -> LayerStep:
        """The same for one token, x [D, B], with the weights as they are now."""
        scale = (1.0 + self.weight.float())[:, None]

        def step(x: Tensor) -> Tensor:
            wide = x.float()
            return (wide * wide.square().mean(0).add_(EPSILON).rsqrt_()).mul_(scale).to(x.dtype)

        return step

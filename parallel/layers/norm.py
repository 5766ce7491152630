"""RMSNorm, with NVIDIA Apex's fused kernel if it is installed, else with PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from griffin.parallel.context import Context
from griffin.parallel.layers.linear import LayerStep
from griffin.parallel.sharding import Piece, describe, zeros

EPSILON = 1e-6


def apex_rms_norm() -> Callable[..., Tensor] | None:
    """Return Apex's RMSNorm for a float32 weight and any input dtype, or None without NVIDIA's Apex.

    Other packages named `apex` lack this function. NVIDIA's without its compiled extensions (the default build) has it,
    but fails when it is called; hence the import of the extension.
    """
    if not torch.cuda.is_available():
        return None
    try:
        importlib.import_module("fused_layer_norm_cuda")
        return importlib.import_module("apex.normalization.fused_layer_norm").mixed_dtype_fused_rms_norm_affine
    except (ImportError, AttributeError):
        return None


class RMSNorm(nn.Module):
    """Compute `x * rsqrt(mean(x^2) + 1e-6) * (1 + w)` over the last axis of x [..., D], in float32.

    The output has the dtype of x.
    """

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
        """Return the norm for one token, x [D, B], with the current weight."""
        scale = (1.0 + self.weight.float())[:, None]

        def step(x: Tensor) -> Tensor:
            wide = x.float()
            return (wide * wide.square().mean(0).add_(EPSILON).rsqrt_()).mul_(scale).to(x.dtype)

        return step

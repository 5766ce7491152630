"""Interface of temporal mixers: the registry's descriptor, and protocols of the module and of decoding.

This module does not import torch, so settings can be validated without it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from griffin.parallel.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from griffin.parallel.context import Context, DecodePosition, Documents
    from griffin.parallel.layers.linear import Branch

# bf16 matrix FLOPs in the time it takes to move one byte: about 800 TFLOP/s over 4 TB/s on a Hopper GPU.
FLOPS_PER_BYTE = 200.0


@dataclass(frozen=True)
class Cost:
    """Cost per token: matrix FLOPs of the forward pass, and bytes moved outside matrix products (bfloat16).

    The bytes are a third of those of a forward and backward pass, which has three times the FLOPs.
    """

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def time(self) -> float:
        """Estimated time, in units of one matrix FLOP."""
        return self.flops + FLOPS_PER_BYTE * self.bytes


@dataclass(frozen=True)
class Multiple:
    """Constraint: a model setting must be a multiple of a number (for the reason `why`) or of another setting."""

    setting: str
    of: int | str
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """Registry entry of a temporal mixer. Settings are named as fields of ModelConfig.

    name: name in `model.pattern`.
    kind: prefix of its parameters, `blocks.I.KIND.…`; their gradient norm is `grad_norm/KIND`. Mixers may share a kind,
        and then share its parameter names.
    module: "package.module:class" of its `MixerModule`, imported lazily.
    widths: settings that the mixer requires besides `width`.
    shards: settings that the tensor-parallel size must divide, such as a number of heads or of channel blocks.
    multiples: further divisibility constraints.
    """

    name: str
    kind: str
    module: str
    widths: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    multiples: tuple[Multiple, ...] = ()

    def load(self) -> type[MixerModule]:
        """Import and return the mixer's class."""
        module, _, name = self.module.partition(":")
        return getattr(importlib.import_module(module), name)


class MixerModule(Protocol):
    """Interface of a mixer's class, which is also an `nn.Module`; see `griffin.parallel.block.ResidualBlock`.

    Pass every parameter with its pieces to `griffin.parallel.sharding.describe`: initialisation, checkpoints, gradient
    norms and parameter counts follow from the pieces.
    """

    @classmethod
    def build(cls, name: str, context: Context, recompute: str) -> Self:
        """Build the mixer with parameters called `name`.…; `recompute` is one of griffin.parallel.config.RECOMPUTES."""
        ...

    @staticmethod
    def cost(model: ModelConfig, sequence: int) -> Cost:
        """Return the cost of the mixer alone, for sequences of this length."""
        ...

    def __call__(self, u: Tensor, documents: Documents) -> Branch:
        """Map u [T, B, D] to [T, B, D], and a bias [D] or None. With sequence parallelism both are sharded along T."""
        ...

    def prefill(self, u: Tensor, documents: Documents, max_length: int) -> tuple[Branch, Any]:
        """Compute the output, and the decoding state after the last document of each sequence.

        The state is a dataclass of tensors only, of constant size, for sequences of up to `max_length` tokens.
        """
        ...

    def stepper(self) -> MixerStep:
        """Return the single-token mixer for decoding from that state, with the current weights."""
        ...


class MixerStep(Protocol):
    """Single-token mixer of B sequences, channels first, without gradients."""

    def prepare(self, state: Any, position: DecodePosition) -> Any:
        """Compute what the next call needs of the token's position. Not traced by torch.compile."""
        ...

    def __call__(self, u: Tensor, state: Any, prepared: Any) -> Tensor:
        """Map u [D, B] to [D, B], and update the state in place."""
        ...

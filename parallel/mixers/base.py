"""What a temporal mixer is: the descriptor that the registry holds, and the protocols of its module and its decoding.

Nothing here imports torch: settings are checked by descriptors, without the modules.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from griffin.parallel.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from griffin.parallel.context import Clock, Context, Documents

# bf16 matrix FLOPs that take the time of moving one byte: about 800 TFLOP/s over 4 TB/s on a Hopper GPU.
FLOPS_PER_BYTE = 200.0


@dataclass(frozen=True)
class Cost:
    """Forward cost per token: matrix FLOPs, and bytes moved outside matrix products (bfloat16)."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def time(self) -> float:
        """In units of one matrix FLOP."""
        return self.flops + FLOPS_PER_BYTE * self.bytes


@dataclass(frozen=True)
class Multiple:
    """A setting of the model that must be a multiple: of a number, for the reason `why`, or of another setting."""

    setting: str
    of: int | str
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """A temporal mixer as the registry knows it; settings are named as fields of ModelConfig.

    name: in `model.pattern`.
    kind: part of its parameters' names, `blocks.I.KIND.…`; their gradient norm is `grad_norm/KIND`. Mixers that share
        a kind share its names.
    module: "package.module:class" of its `MixerModule`, imported when it is first needed.
    widths: settings that a pattern with this mixer needs, besides `width`.
    shards: settings that a tensor-parallel size must divide: numbers of heads, say, or of blocks of channels.
    multiples: what else must divide what.
    """

    name: str
    kind: str
    module: str
    widths: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    multiples: tuple[Multiple, ...] = ()

    def load(self) -> type[MixerModule]:
        module, _, name = self.module.partition(":")
        return getattr(importlib.import_module(module), name)


class MixerModule(Protocol):
    """What a mixer's class is, besides an `nn.Module`; see `griffin.parallel.block.ResidualBlock`.

    Every parameter is given its pieces by `griffin.parallel.sharding.describe`: initialisation, checkpoints, gradient
    norms and parameter counts follow from them.
    """

    @classmethod
    def build(cls, name: str, context: Context, recompute: str) -> Self:
        """The mixer whose parameters are called `name`.…; `recompute` is one of griffin.parallel.config.RECOMPUTES."""
        ...

    @staticmethod
    def cost(model: ModelConfig, sequence: int) -> Cost:
        """Of the mixer alone, for sequences of so many tokens."""
        ...

    def __call__(self, u: Tensor, documents: Documents) -> Tensor:
        """[T, B, D] of u [T, B, D]; with sequence parallelism both are this rank's part of T."""
        ...

    def prefill(self, u: Tensor, documents: Documents, longest: int) -> tuple[Tensor, Any]:
        """As a call, and the state from which the last document of each sequence goes on, to at most `longest` tokens.

        The state is a dataclass of tensors alone, whose size does not change.
        """
        ...

    def stepper(self) -> MixerStep:
        """What goes on from that state, one token at a time, with the weights as they are now."""
        ...


class MixerStep(Protocol):
    """A mixer for one more token of B sequences, channels first; without gradients."""

    def now(self, state: Any, clock: Clock) -> Any:
        """What a call needs of the token's time; asked for before each, outside of what torch.compile compiles."""
        ...

    def __call__(self, u: Tensor, state: Any, now: Any) -> Tensor:
        """[D, B] of u [D, B]; changes the state in place."""
        ...

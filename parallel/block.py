"""The residual block that every family shares (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from griffin.parallel.config import RECOMPUTES
from griffin.parallel.context import Context, Documents
from griffin.parallel.mixers import MIXERS
from griffin.parallel.mixers.base import MixerStep
from griffin.parallel.mlp import MLP
from griffin.parallel.norm import RMSNorm


class ResidualBlock(nn.Module):
    """`r = x + Mix(norm1(x)); r + MLP(norm2(r))` on x [T, B, D]; with sequence parallelism, on this rank's part of T.

    `index` counts blocks over the whole model, from 0.
    """

    def __init__(self, index: int, mixer: str, context: Context, recompute: str = "none"):
        super().__init__()
        assert recompute in RECOMPUTES, recompute
        name = f"blocks.{index}"
        self.recompute = recompute
        self.mixer_norm = RMSNorm(f"{name}.mixer_norm", context)
        described = MIXERS[mixer]
        self.mixer = described.load().build(f"{name}.{described.kind}", context, recompute)
        self.mlp_norm = RMSNorm(f"{name}.mlp_norm", context)
        self.mlp = MLP(f"{name}.mlp", context)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        return self._run("block", self._block, x, documents)

    def prefill(self, x: Tensor, documents: Documents, longest: int) -> tuple[Tensor, Any]:
        """As `forward`, and the mixer's state, from which its sequences go on to at most `longest` tokens."""
        mixed, state = self.mixer.prefill(self.mixer_norm(x), documents, longest)
        return self._mlp(x, mixed), state

    def stepper(self) -> BlockStep:
        """The block for one token at a time, with the weights as they are now."""
        return BlockStep(self)

    def _block(self, x: Tensor, documents: Documents) -> Tensor:
        return self._run("mlp", self._mlp, x, self._run("mixer", self._mix, x, documents))

    def _mix(self, x: Tensor, documents: Documents) -> Tensor:
        return self.mixer(self.mixer_norm(x), documents)

    def _mlp(self, x: Tensor, mixed: Tensor) -> Tensor:
        x, normed = self.mlp_norm(x, mixed)
        return x + self.mlp(normed)

    def _run(self, part: str, function: Callable[..., Tensor], *args: object) -> Tensor:
        if self.recompute == part and self.training:
            # Nothing in a block draws random numbers.
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)


class BlockStep:
    """A block that goes on from its mixer's state with one token of B sequences, x [D, B]."""

    def __init__(self, block: ResidualBlock):
        self._mixer_norm, self._mlp_norm = block.mixer_norm.stepper(), block.mlp_norm.stepper()
        self.mixer: MixerStep = block.mixer.stepper()
        self._mlp = block.mlp.stepper()

    def __call__(self, x: Tensor, state: Any, now: Any) -> Tensor:
        x = x + self.mixer(self._mixer_norm(x), state, now)
        return x + self._mlp(self._mlp_norm(x))

"""Residual block, shared by all model families (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from griffin.parallel.config import NORMS_GELU, RECOMPUTES
from griffin.parallel.context import Context, Documents
from griffin.parallel.layers.linear import Branch
from griffin.parallel.layers.mlp import MLP
from griffin.parallel.layers.norm import RMSNorm
from griffin.parallel.mixers import MIXERS
from griffin.parallel.mixers.base import MixerStep


class ResidualBlock(nn.Module):
    """Compute `r = x + Mix(norm1(x)); r + MLP(norm2(r))` for x [T, B, D], or this rank's shard of T.

    Blocks pass on the residual stream as x and the last branch, which the next norm adds to it in its own program.
    With sequence parallelism x is sharded along T. `index` numbers the blocks of the whole model, from 0.
    """

    def __init__(self, index: int, mixer: str, context: Context, recompute: str = "none"):
        super().__init__()
        assert recompute in RECOMPUTES, recompute
        name = f"blocks.{index}"
        self.recompute = recompute
        selective = recompute == NORMS_GELU
        self.mixer_norm = RMSNorm(f"{name}.mixer_norm", context, recompute=selective)
        entry = MIXERS[mixer]
        self.mixer = entry.load().build(f"{name}.{entry.kind}", context, recompute)
        self.mlp_norm = RMSNorm(f"{name}.mlp_norm", context, recompute=selective)
        self.mlp = MLP(f"{name}.mlp", context, recompute=selective)

    def forward(self, x: Tensor, branch: Branch | None, documents: Documents) -> tuple[Tensor, Branch]:
        if self.recompute in ("block", "mixer") and self.training:
            x, branch = residual_sum(x, branch), None  # what is recomputed then keeps one input
        return self._run("block", self._block, x, branch, documents)

    def prefill(
        self, x: Tensor, branch: Branch | None, documents: Documents, max_length: int
    ) -> tuple[Tensor, Branch, Any]:
        """Run `forward`, and also return the mixer's state, for sequences of up to `max_length` tokens."""
        x, normed = self.mixer_norm(x, branch)
        branch, state = self.mixer.prefill(normed, documents, max_length)
        return *self._mlp(x, branch), state

    def stepper(self) -> BlockStep:
        """Return the block for one token at a time, with the current weights."""
        return BlockStep(self)

    def _block(self, x: Tensor, branch: Branch | None, documents: Documents) -> tuple[Tensor, Branch]:
        return self._run("mlp", self._mlp, *self._run("mixer", self._mix, x, branch, documents))

    def _mix(self, x: Tensor, branch: Branch | None, documents: Documents) -> tuple[Tensor, Branch]:
        x, normed = self.mixer_norm(x, branch)
        return x, self.mixer(normed, documents)

    def _mlp(self, x: Tensor, branch: Branch) -> tuple[Tensor, Branch]:
        x, normed = self.mlp_norm(x, branch)
        return x, self.mlp(normed)

    def _run(self, part: str, function: Callable[..., tuple[Tensor, Branch]], *args: object) -> tuple[Tensor, Branch]:
        if self.recompute == part and self.training:
            # Blocks draw no random numbers.
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)


def residual_sum(x: Tensor, branch: Branch | None) -> Tensor:
    """Return the sum of x and a branch, as the norms' `add_rms_norm` does."""
    if branch is None:
        return x
    value, bias = branch
    return x + (value if bias is None else value + bias)


class BlockStep:
    """Single-token block: processes one token of B sequences, x [D, B], and updates the mixer's state."""

    def __init__(self, block: ResidualBlock):
        self._mixer_norm, self._mlp_norm = block.mixer_norm.stepper(), block.mlp_norm.stepper()
        self.mixer: MixerStep = block.mixer.stepper()
        self._mlp = block.mlp.stepper()

    def __call__(self, x: Tensor, state: Any, prepared: Any) -> Tensor:
        x = x + self.mixer(self._mixer_norm(x), state, prepared)
        return x + self._mlp(self._mlp_norm(x))

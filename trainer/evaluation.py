"""What is found out of a model during its training, every so many steps: the loss on held-out data.

A further evaluation is an `Evaluation` in the list that `trainer.loop` makes. Its figures reach metrics.jsonl, the
console and TensorBoard under the names that it gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from griffin.trainer.settings.sections import TrainConfig
from griffin.trainer.step import Batch, Training


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation. All ranks call `run` at the same steps; it changes no weight and returns figures by name, the
    same on every rank."""

    name: str  # in messages; "" where there is no other to tell it from
    every: int  # optimizer steps; 0 is never
    run: Callable[[Training], Mapping[str, float]]

    def is_due(self, step: int, last: int) -> bool:
        """Before the first step, every `every` steps, and after the `last` one."""
        return self.every > 0 and (step % self.every == 0 or step == last)


def held_out_loss(
    name: str, settings: TrainConfig, draw: Callable[[], Iterator[Batch]], bytes_per_token: float | None
) -> Evaluation:
    """The loss on `settings.eval_batches` global batches of one held-out set, the same ones each time.

    Args:
        name: of the set; "" for the only one, whose figures have no name after a slash.
        draw: this rank's micro-batches, from the first on.
        bytes_per_token: bytes of text of a predicted token, in the mean over the set; None where not known.
    """

    def run(training: Training) -> Mapping[str, float]:
        loss, tokens = training.evaluate(draw(), settings.eval_batches)
        return loss_figures(name, loss, tokens, bytes_per_token)

    return Evaluation(name=name, every=settings.eval_interval, run=run)


def loss_figures(name: str, loss: float, tokens: int, bytes_per_token: float | None) -> dict[str, float]:
    """A held-out set's figures, from its mean loss (nats per token) over so many predicted tokens."""
    if not name:
        return {"eval_loss": loss, "eval_loss_tokens": tokens}
    figures = {
        f"eval_loss/{name}": loss,
        f"eval_loss_tokens/{name}": tokens,
        f"eval_perplexity/{name}": _exponential(loss),
    }
    if bytes_per_token is not None:
        figures[f"eval_bits_per_byte/{name}"] = loss / math.log(2) / bytes_per_token
    return figures


def _exponential(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf

"""Evaluations of a model during training, such as the loss on held-out data.

To add one, append an `Evaluation` to the list in `trainer.loop`; trainer/README.md says how. Its figures are written
to metrics.jsonl, the console and TensorBoard under the names that it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from griffin.trainer.settings.sections import TrainConfig
from griffin.trainer.step import Batch, Training


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation. All ranks call `run` at the same steps; it changes no weight.

    It returns figures by name, which are the same on every rank.
    """

    name: str  # for messages; "" if it is the only one
    every: int  # optimizer steps between evaluations; 0 is never
    run: Callable[[Training], Mapping[str, float]]

    def is_due(self, step: int, last: int) -> bool:
        """Whether to evaluate after `step`: before the first step, every `every` steps, and after the `last` one."""
        return self.every > 0 and (step % self.every == 0 or step == last)


def held_out_loss(
    name: str, settings: TrainConfig, batches: Callable[[], Iterator[Batch]], bytes_per_token: float | None
) -> Evaluation:
    """An evaluation of the loss on the first `settings.eval_batches` global batches of one held-out set.

    Args:
        name: the set's name; "" for the only one, whose figures then have no "/NAME".
        batches: returns an iterator over this rank's micro-batches, from the first one on.
        bytes_per_token: mean number of bytes of text per predicted token of the set; None if unknown.
    """

    def run(training: Training) -> Mapping[str, float]:
        loss, tokens = training.evaluate(batches(), settings.eval_batches)
        return loss_figures(name, loss, tokens, bytes_per_token)

    return Evaluation(name=name, every=settings.eval_interval, run=run)


def loss_figures(name: str, loss: float, tokens: int, bytes_per_token: float | None) -> dict[str, float]:
    """The figures of a held-out set, from its mean loss (nats per token) over `tokens` predicted tokens."""
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

"""Text goes on: prompts of token ids in, sampled token ids out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from griffin.tools.inference.model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest one at temperature 0, else drawn from softmax(logits / temperature).

    It is drawn from the `top_k` likeliest tokens, and of what they leave from the fewest likeliest ones whose
    probabilities come to `top_p`. Raises ValueError for a value that makes no sense.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, holds, accepted in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (the likeliest token) or more"),
            ("top-k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ):
            if not holds:
                raise ValueError(f"--{option} {value}: must be {accepted}")


class PromptGenerators:
    """Uniform draws in [0, 1), one after the other for each of some prompts: the same in whatever batch they are."""

    def __init__(self, seed: int, prompts: Sequence[int], device: torch.device) -> None:
        self._generators = [np.random.default_rng((seed, prompt)) for prompt in prompts]
        self._device = device

    def next(self) -> Tensor:
        """float64 [prompts]."""
        draws = [generator.random() for generator in self._generators]
        return torch.tensor(draws, dtype=torch.float64, device=self._device)


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """The next tokens, int64 [B], of logits [B, V]: those at which the cumulative probability passes draws [B].

    Raises ValueError where a row has no largest logit that is finite.
    """
    largest, likeliest = logits.max(-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("logits are not finite: the weights are damaged, or need another --dtype")
    if sampling.temperature == 0:
        return likeliest.squeeze(-1)
    probabilities = ((logits.double() - largest) / sampling.temperature).softmax(-1)
    if sampling.top_k is not None or sampling.top_p < 1:
        probabilities = _truncated(probabilities, sampling)
    # In the order of the vocabulary: where two tokens are almost as likely, rounding does not change what is drawn.
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    place = torch.searchsorted(cumulative, draws[:, None] * total, right=True)
    last = (cumulative < total).sum(-1, keepdim=True)  # that can be drawn: a product may round up to the total
    return torch.minimum(place, last).squeeze(-1)


def _truncated(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V] with 0 for tokens that are not to be drawn."""
    size = probabilities.shape[-1]
    sizes, order = probabilities.topk(min(sampling.top_k or size, size))  # the likeliest first
    likelier = sizes.cumsum(-1) - sizes
    sizes = sizes.masked_fill(likelier >= sampling.top_p * sizes.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probabilities).scatter(-1, order, sizes)


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stops: frozenset[int] = frozenset(),
    sampling: Sampling,
    first: int = 0,
) -> list[list[int]]:
    """What follows each prompt, as a batch; a collective of tensor ranks, the same on each.

    Args:
        prompts: token ids, at least one each.
        max_tokens: that a prompt is continued by, unless one of `stops` ends it, which is the last one then.
        first: number of the first prompt, as they are counted for what is drawn.

    Raises ValueError where logits are not finite.
    """
    draws = PromptGenerators(sampling.seed, range(first, first + len(prompts)), model.grid.device)
    tensors = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    logits, state = model.decoder.prefill(tensors, max(map(len, prompts)) + max_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step in range(max_tokens):
        tokens = sample(model.gathered(logits), draws.next(), sampling)
        for place, token in enumerate(tokens.tolist()):
            if place in going:
                found[place].append(token)
                if token in stops:
                    going.remove(place)
        if not going or step == max_tokens - 1:
            break
        logits = model.decoder.step(tokens, state)  # of those that have ended too
    return found


def generate_all(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    max_tokens: int,
    stops: frozenset[int],
    sampling: Sampling,
) -> Iterator[list[int]]:
    """As `generate`, `batch` prompts at a time."""
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        yield from generate(model, some, max_tokens=max_tokens, stops=stops, sampling=sampling, first=first)

"""Generate: prompts of token ids in, sampled token ids out."""

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
    """How the next token is chosen: greedy at temperature 0, else sampled from softmax(logits / temperature).

    Sampling is restricted to the `top_k` likeliest tokens, and among those to the fewest likeliest ones whose
    probabilities sum to `top_p`. Raises ValueError for a value out of range.
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
    """One random generator per prompt, seeded by sampling seed and prompt number, so that batches do not matter."""

    def __init__(self, seed: int, prompts: Sequence[int], device: torch.device) -> None:
        self._generators = [np.random.default_rng((seed, prompt)) for prompt in prompts]
        self._device = device

    def uniform(self) -> Tensor:
        """Draw a number in [0, 1) for each prompt: float64 [prompts]."""
        draws = [generator.random() for generator in self._generators]
        return torch.tensor(draws, dtype=torch.float64, device=self._device)


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """Return the next tokens, int64 [B]: where the cumulative probability of logits [B, V] exceeds draws [B].

    Raises ValueError if the largest logit of a row is not finite.
    """
    largest, likeliest = logits.max(-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("logits are not finite: the weights are damaged, or need another --dtype")
    if sampling.temperature == 0:
        return likeliest.squeeze(-1)
    probabilities = ((logits.double() - largest) / sampling.temperature).softmax(-1)
    if sampling.top_k is not None or sampling.top_p < 1:
        probabilities = _truncated(probabilities, sampling)
    # In vocabulary order, so that rounding does not change the result where two tokens are almost equally likely.
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    place = torch.searchsorted(cumulative, draws[:, None] * total, right=True)
    last = (cumulative < total).sum(-1, keepdim=True)  # last token with a probability: draws * total may round up
    return torch.minimum(place, last).squeeze(-1)


def _truncated(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities [B, V] with 0 for tokens outside of top-k and top-p."""
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
    """Continue a batch of prompts. A collective of tensor ranks, with the same result on each.

    Args:
        model: the model, loaded on all tensor ranks.
        prompts: token ids, at least one each.
        max_tokens: most tokens per answer.
        stops: tokens that end an answer; the one that does is its last token.
        sampling: how tokens are chosen.
        first: number of the first prompt, which the sampling seed is combined with.

    Raises ValueError if logits are not finite.
    """
    generators = PromptGenerators(sampling.seed, range(first, first + len(prompts)), model.grid.device)
    tensors = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    logits, state = model.decoder.prefill(tensors, max(map(len, prompts)) + max_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for step in range(max_tokens):
        tokens = sample(model.all_gather_logits(logits), generators.uniform(), sampling)
        for place, token in enumerate(tokens.tolist()):
            if place in unfinished:
                answers[place].append(token)
                if token in stops:
                    unfinished.remove(place)
        if not unfinished or step == max_tokens - 1:
            break
        logits = model.decoder.step(tokens, state)  # finished ones too
    return answers


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

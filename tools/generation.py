"""Text goes on: prompts of token ids in, sampled token ids out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from griffin.parallel.decode import Decoder
from griffin.tools.inference import Model


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

    def draws(self, prompt: int, count: int) -> np.ndarray:
        """Uniform draws in [0, 1) for a prompt's tokens, float32 [count]: the same in whatever batch it is."""
        return np.random.default_rng((self.seed, prompt)).random(count, dtype=np.float32)


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """The next tokens, int64 [B], of logits [B, V]: those at which the cumulative probability passes draws [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits, order = logits.double() / sampling.temperature, None
    if sampling.top_k is not None or sampling.top_p < 1:
        logits, order = logits.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]))  # the likeliest first
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= sampling.top_p, 0)
    cumulative = probabilities.cumsum(-1)
    # Below the total, whatever rounds: draws are float32, sums float64. What has no probability is never passed at.
    place = torch.searchsorted(cumulative, draws.double()[:, None] * cumulative[:, -1:], right=True)
    return (place if order is None else order.gather(-1, place)).squeeze(-1)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stops: frozenset[int] = frozenset(),
    sampling: Sampling,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """What follows each prompt, as a batch; a collective of tensor ranks, the same on each.

    Args:
        prompts: token ids, at least one each.
        max_tokens: that a prompt is continued by, unless one of `stops` ends it, which is the last one then.
        numbers: of the prompts, which decide on what is drawn; by default they are counted.
    """
    decoder, device = Decoder(model.stage), model.grid.device
    draws = np.stack([sampling.draws(n, max_tokens) for n in (numbers or range(len(prompts)))])
    draws_per_token = torch.from_numpy(draws).to(device).unbind(1)
    tensors = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    logits, state = decoder.prefill(tensors, max(map(len, prompts)) + max_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step in range(max_tokens):
        tokens = sample(model.gathered(logits), draws_per_token[step], sampling)
        for place, token in enumerate(tokens.tolist()):
            if place in going:
                found[place].append(token)
                if token in stops:
                    going.remove(place)
        if not going or step == max_tokens - 1:
            break
        logits = decoder.step(tokens, state)  # of those that have ended too
    return found


def generate_all(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    max_tokens: int,
    stops: frozenset[int],
    sampling: Sampling,
) -> list[list[int]]:
    """As `generate`, `batch` prompts at a time, those of like length together."""
    by_length = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found: dict[int, list[int]] = {}
    for first in range(0, len(prompts), batch):
        numbers = by_length[first : first + batch]
        some = [prompts[number] for number in numbers]
        answers = generate(model, some, max_tokens=max_tokens, stops=stops, sampling=sampling, numbers=numbers)
        found |= dict(zip(numbers, answers, strict=True))
    return [found[number] for number in range(len(prompts))]

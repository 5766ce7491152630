"""What of training with CUDA graphs needs no GPU: the tensors that a graph reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from griffin.parallel.config import ParallelConfig
from griffin.trainer.graph import NAMES, StaticBatches
from tests.layouts import make_config, micro_batches

CPU = torch.device("cpu")
CONFIG = make_config("griffin", ParallelConfig())


def given(step: int) -> list[dict[str, Tensor]]:
    """With the offsets of documents, whose number changes."""
    batches = micro_batches(CONFIG, step, 0, 1)
    return [{**batch, "offsets": (batch["positions"] == 0).flatten().nonzero()} for batch in batches]


def test_batches_come_in_the_same_tensors() -> None:
    static = StaticBatches(CPU)
    first = list(static.read(iter(given(0)), 4))
    places = [[batch[name].data_ptr() for name in NAMES] for batch in first]
    assert len({place for batch in places for place in batch}) == 4 * len(NAMES)
    for step in range(3):
        batches = given(step)
        assert len({len(batch["offsets"]) for batch in (*batches, *given(step + 1))}) > 1
        found = list(static.read(iter(batches), 4))
        assert [[batch[name].data_ptr() for name in NAMES] for batch in found] == places
        for batch, expected in zip(found, batches, strict=True):
            assert batch.keys() == set(NAMES)
            assert all(torch.equal(batch[name], expected[name]) for name in NAMES)


def test_what_is_given_is_not_held() -> None:
    static = StaticBatches(CPU)
    batches = given(0)
    (held,) = static.read(iter(batches), 1)
    before = held["tokens"].clone()
    batches[0]["tokens"].zero_()
    assert torch.equal(held["tokens"], before)


def test_no_more_batches_are_taken_than_asked_for() -> None:
    static, batches = StaticBatches(CPU), iter(given(0))
    for _ in range(2):
        list(static.read(batches, 2))
    assert next(batches, None) is None


def test_another_shape_is_refused() -> None:
    static = StaticBatches(CPU)
    list(static.read(iter(given(0)), 1))
    short = {name: value[:1] for name, value in given(1)[0].items()}  # which would be broadcast
    with pytest.raises(AssertionError, match="tokens"):
        list(static.read(iter([short]), 1))

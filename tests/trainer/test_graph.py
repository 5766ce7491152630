"""What of training with CUDA graphs needs no GPU: the tensors that a graph reads, and what is run and replayed when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from griffin.parallel.config import ParallelConfig
from griffin.trainer.graph import NAMES, WARM_UP_STEPS, GraphedPasses, StaticBatches
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


class Gpu:
    """Stands in for `torch.cuda`: logs what it is told, with the sum of the tokens that a replay would read."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.captured: list[dict[str, Tensor]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Stream:
            def __init__(self, device: Any = None):
                self.name = "default" if device is None else "own"

            def wait_stream(self, other: Stream) -> None:
                gpu.log.append(f"{self.name} waits")

        class Graph:
            def replay(self) -> None:
                gpu.log.append(("replay", [batch["tokens"].sum().item() for batch in gpu.captured]))

        @contextmanager
        def stream(of: Stream) -> Iterator[None]:
            gpu.log.append(f"on {of.name}")
            yield

        @contextmanager
        def graph(graph: Graph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            assert stream.name == "own"
            gpu.log.append("capture")
            yield

        for name, value in {"Stream": Stream, "CUDAGraph": Graph, "stream": stream, "graph": graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)

    def schedule(self, *, data_iterator: Iterator[dict[str, Tensor]], num_microbatches: int) -> list[Tensor]:
        self.captured = list(data_iterator)
        assert len(self.captured) == num_microbatches
        self.log.append("schedule")
        return [batch["tokens"].sum() for batch in self.captured]


def test_passes_are_run_then_captured_once_and_replayed_with_new_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    gpu.install(monkeypatch)
    passes = GraphedPasses(gpu.schedule, CPU)
    for step in range(WARM_UP_STEPS + 3):
        gpu.log.clear()
        batches = given(step)
        passes(data_iterator=iter(batches), num_microbatches=4)
        sums = [batch["tokens"].sum().item() for batch in batches]
        work: list[Any] = ["schedule"] if step < WARM_UP_STEPS else [("replay", sums)]
        capture = ["capture", "schedule"] if step == WARM_UP_STEPS else []
        assert gpu.log == ["own waits", "on own", *capture, *work, "default waits"]

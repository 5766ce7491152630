"""The passes of a training step as a CUDA graph, for small models whose kernels take less time than their launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from griffin.trainer.settings.sections import TrainConfig

# Of a batch. Others, such as document offsets, may have another shape in every batch.
NAMES = ("tokens", "labels", "positions", "loss_mask")
WARM_UP_STEPS = 3  # until everything is compiled, and all ranks are connected


def check_graphs(wanted: bool, device: torch.device) -> None:
    """Raise ValueError if `train.cuda_graphs` cannot run on a device."""
    if wanted and device.type != "cuda":
        raise ValueError(f"train.cuda_graphs = True: needs a GPU, the device is {device.type}; must be false")


def attention_backend(train: TrainConfig) -> str:
    """Return `train.attention`, or with `train.cuda_graphs` the backend that reads no document offsets."""
    return "flex" if train.cuda_graphs else train.attention


class StaticBatches:
    """Micro-batches in tensors that stay where they are: what a graph reads, whose addresses are fixed."""

    def __init__(self, device: torch.device):
        self._device = device
        self._held: list[dict[str, Tensor]] = []

    def read(self, batches: Iterator[Mapping[str, Tensor]], count: int) -> Iterator[dict[str, Tensor]]:
        """Copy the next `count` micro-batches, in the same shapes each time, and return them, of NAMES alone."""
        given = [{name: batch[name] for name in NAMES} for _, batch in zip(range(count), batches, strict=False)]
        if not self._held:
            self._held = [
                {name: value.to(self._device, non_blocking=True, copy=True) for name, value in batch.items()}
                for batch in given
            ]
            return iter(self._held)
        assert len(given) == len(self._held), (len(given), len(self._held))
        for held, batch in zip(self._held, given, strict=True):
            for name, value in batch.items():
                assert value.shape == held[name].shape, (name, value.shape, held[name].shape)  # it would be broadcast
                held[name].copy_(value, non_blocking=True)
        return iter(self._held)


class GraphedPasses:
    """megatron-core's schedule without pipeline, captured as a CUDA graph after WARM_UP_STEPS calls, then replayed.

    Only work of the GPU is replayed: what the schedule does on the host, such as calling hooks and timers, is done
    when it is captured alone. Its results are in the same tensors each time. Everything that has to do with autograd
    must run on one stream, which is not the default one: build megatron-core's DistributedDataParallel, which keeps
    autograd nodes, within `stream` too. (megatron-core's own FullCudaGraphWrapper captures on a stream of its own.)
    """

    def __init__(self, schedule: Callable[..., list[Tensor]], device: torch.device):
        self._schedule = schedule
        self._batches = StaticBatches(device)
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._losses: list[Tensor] = []

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Context of the stream, which waits for the current one before, and the current one for it after."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def __call__(
        self, *, data_iterator: Iterator[Mapping[str, Tensor]], num_microbatches: int, **settings: Any
    ) -> list[Tensor]:
        """Run the schedule over the next micro-batches. All but the batches must be the same in every call."""
        batches = self._batches.read(data_iterator, num_microbatches)
        settings |= {"data_iterator": batches, "num_microbatches": num_microbatches}
        with self.stream():
            if self._graph is None and self._calls < WARM_UP_STEPS:
                self._calls += 1
                return self._schedule(**settings)
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                # Other threads, which load data and save checkpoints, may use the GPU meanwhile.
                with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._losses = self._schedule(**settings)
            self._graph.replay()
        return self._losses

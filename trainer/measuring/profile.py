"""Traces of chosen steps on chosen ranks, by torch.profiler, and what GPU memory held during them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profiles"
_MEMORY_EVENTS = 200_000  # of allocations and releases that a snapshot shows


class StepProfiler:
    """Writes, for each of `steps`, `step-00000010.rank-0.trace.json.gz`, for Perfetto and TensorBoard's trace viewer.

    On a GPU also `....memory.pickle`, for https://pytorch.org/memory_viz. A file that is there is not written again.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...], ranks: tuple[int, ...], rank: int, device: torch.device):
        self._folder, self._rank, self._device = folder, rank, device
        self._steps = frozenset(steps) if rank in ranks else frozenset()

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Profile what runs within it, if the step is one of those."""
        trace = self._folder / f"step-{step:08}.rank-{self._rank}.trace.json.gz"
        if step not in self._steps or trace.exists():
            with nullcontext():
                yield
            return
        self._folder.mkdir(exist_ok=True)
        activities = [ProfilerActivity.CPU]
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        try:
            with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
                yield
                if on_gpu:
                    torch.cuda.synchronize(self._device)
            profiler.export_chrome_trace(str(trace))
            if on_gpu:
                torch.cuda.memory._dump_snapshot(str(trace).replace(".trace.json.gz", ".memory.pickle"))
        finally:
            if on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

"""A training step measured on this machine's GPU, beside its prediction."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from griffin.parallel.context import with_offsets
from griffin.parallel.world.grid import set_cuda_defaults, single_rank_grid
from griffin.tools.bench.count.step import Step
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training

WARM_UP = 5  # steps, in which kernels and graphs are compiled
LEAST = 1e-3  # of a step: operators below are not listed
_LAYOUT = "{:44} {:>12} {:>12} {:>8}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of a training step, in seconds."""

    step: float
    passes: float  # forward and backward passes of all micro-batches
    optimizer: float
    peak: int  # bytes, 0 on a CPU
    operators: Mapping[str, float]  # time on the device by operator
    others: float  # time on the device of what belongs to none of them
    kernels: int  # 0 on a CPU


def prepare(config: Config, world: int) -> str:
    """Return the name of this machine's GPU, and set what CUDA reads when it starts.

    Raises ValueError if the step is not one of a single rank, or if there is no GPU.
    """
    if world != 1:
        raise ValueError(f"--world {world}: must be 1 with --measure, which runs one rank on one GPU")
    if not torch.cuda.is_available():
        raise ValueError("--measure: needs a CUDA device and a PyTorch built for it; torch finds none here")
    set_cuda_defaults(config.parallel)
    return torch.cuda.get_device_name()


def check_memory(step: Step, there: int) -> None:
    """Raise ValueError if the step is predicted to take more bytes than there are."""
    if (needed := predicted_bytes(step)) > there:
        raise ValueError(
            f"--measure: the step takes {needed / 1e9:.0f} GB by this count, the GPU has {there / 1e9:.0f} GB; "
            "accepted: fewer blocks, sequences or tokens"
        )


def predicted_bytes(step: Step) -> float:
    return step.static_bytes + step.slowest.rank.peak


def measure_step(config: Config, names: Iterable[str], repeats: int) -> Measured:
    """Train for some steps on random tokens.

    Args:
        config: of a model and a batch that one device holds.
        names: the operators that are timed, as `Op.name`.
        repeats: steps that are timed.
    """
    with single_rank_grid() as grid:
        on_gpu = grid.device.type == "cuda"
        training = Training(config, grid)
        batches = list(random_batches(config, training.micro_batches))
        for _ in range(WARM_UP):
            training.step(iter(batches))
        gc.collect()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        times = [training.step(iter(batches)).times for _ in range(repeats)]
        if on_gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begun) / repeats
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            training.gradients(iter(batches))
            if on_gpu:
                torch.cuda.synchronize()
        events = profiler.events()
        operators = operator_seconds(events, set(names), on_gpu=on_gpu)
        on_device = [event for event in events if event.device_type == DeviceType.CUDA]
        total = sum(event.time_range.elapsed_us() for event in on_device) / 1e6
        if not on_gpu:
            total = sum(event.self_cpu_time_total for event in events) / 1e6
        return Measured(
            step=seconds,
            passes=median(one.forward_backward for one in times),
            optimizer=median(one.optimizer for one in times),
            peak=peak,
            operators=operators,
            others=max(0.0, total - sum(operators.values())),
            kernels=len(on_device),
        )


def random_batches(config: Config, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of random tokens, a document each sequence, as the training's loader makes them."""
    rows, length = config.train.micro_batch, config.data.sequence_length
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        tokens = torch.randint(config.model.vocabulary, (rows, length + 1), generator=generator)
        yield with_offsets(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "positions": torch.arange(length).repeat(rows, 1),
                "loss_mask": torch.ones(rows, length),
            }
        )


def operator_seconds(events: Iterable[Any], names: set[str], *, on_gpu: bool) -> Counter[str]:
    """Time on the device of the operators of these names, those within another one of them counted with it."""
    found: Counter[str] = Counter()
    for event in events:
        name = event.name.removeprefix("aten::")
        if name in names and event.device_type == DeviceType.CPU and not _is_within(event, names):
            found[name] += (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
    return found


def _is_within(event: Any, names: set[str]) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.removeprefix("aten::") in names:
            return True
        parent = parent.cpu_parent
    return False


def comparison(step: Step, measured: Measured) -> Iterator[str]:
    """A table of what is predicted beside what is measured, with measured over predicted."""
    tokens = step.tokens / measured.step
    rows: list[tuple[str, float, float, int]] = [
        ("step, ms", step.total * 1e3, measured.step * 1e3, 1),
        ("  forward and backward, ms", step.micro_batches * step.slowest.total * 1e3, measured.passes * 1e3, 1),
        ("  optimizer, ms", step.optimizer * 1e3, measured.optimizer * 1e3, 1),
        ("tokens/s", step.tokens_per_second, tokens, 0),
        ("MFU, %", step.mfu * 100, step.model_flops * tokens / step.device.peak * 100, 1),
    ]
    if measured.peak:
        rows.append(("memory at the peak, GB", predicted_bytes(step) / 1e9, measured.peak / 1e9, 1))
    if measured.kernels:
        kernels = sum(op.kernels for op in step.slowest.rank.ops)
        rows.append(("kernels per micro-batch", kernels, measured.kernels / step.micro_batches, 0))
    yield _LAYOUT.format("", "predicted", "measured", "ratio")
    yield from (_line(*row) for row in rows)
    yield ""
    yield _LAYOUT.format("on the device, ms of a step", "predicted", "measured", "ratio")
    for (name,), time_of_one in step.slowest.by("name").most_common():
        predicted, found = step.micro_batches * time_of_one, measured.operators.get(name, 0.0)
        if max(predicted, found) >= LEAST * step.total:
            yield _line(f"  {name}", predicted * 1e3, found * 1e3, 2)
    yield _line("  others", 0.0, measured.others * 1e3, 2)


def _line(name: str, predicted: float, measured: float, digits: int) -> str:
    """A dash stands for 0, of what is not known on one side."""
    first, second = (f"{value:,.{digits}f}" if value else "-" for value in (predicted, measured))
    return _LAYOUT.format(name, first, second, f"{measured / predicted:.2f}" if predicted and measured else "-")

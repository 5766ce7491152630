"""What a logged step is measured for on every rank: norms, memory, and who waits for whom."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from griffin.parallel import mixers
from griffin.parallel.config import ModelConfig
from griffin.parallel.world.grid import Grid
from griffin.trainer.measuring.clock import Own

_OTHER_KINDS = ("mlp", "norm", "embedding")
_MEMORY = ("memory_allocated_gib", "memory_reserved_gib", "memory_peak_gib")


def known_kinds() -> tuple[str, ...]:
    """All kinds that gradient norms are told apart by: those of mixers first. The same on every rank."""
    return (*mixers.kinds(mixers.MIXERS.values()), *_OTHER_KINDS)


def kind(name: str) -> str:
    """Which of `known_kinds` the tensor of that canonical name belongs to."""
    part = name.split(".")[2 if name.startswith("blocks.") else 0]
    part = "norm" if part.endswith("norm") else part
    assert part in known_kinds(), name
    return part


def kinds(model: ModelConfig) -> tuple[str, ...]:
    """Those of `known_kinds` that the model has."""
    return (*mixers.kinds(mixers.used(model.pattern)), *_OTHER_KINDS)


def counts_once(parameter: nn.Parameter, grid: Grid) -> bool:
    """Whether this rank is the one whose copy of a parameter counts in norms: not its second copy on another pipeline
    stage, nor one that all tensor ranks hold."""
    if getattr(parameter, "shared", False):
        return False
    return bool(parameter.tensor_model_parallel) or grid.tensor_rank == 0  # type: ignore[attr-defined]


def squares(tensors: Iterable[tuple[nn.Parameter, Tensor]], device: torch.device) -> Tensor:
    """Sums of squares by kind, float64 [known kinds], of this rank's part (a shard, float32) of each parameter."""
    found: dict[str, list[Tensor]] = {}
    for parameter, part in tensors:
        if part.numel():
            found.setdefault(kind(parameter.pieces[0].name), []).append(part)  # type: ignore[attr-defined]
    known = known_kinds()
    sums = torch.zeros(len(known), dtype=torch.float64, device=device)
    for name, parts in found.items():
        sums[known.index(name)] = torch.stack(torch._foreach_norm(parts)).double().square().sum()
    return sums


def combine(
    grid: Grid,
    model: ModelConfig,
    *,
    gradients: Tensor,
    parameters: Tensor,
    own: Own,
) -> tuple[dict[str, float], list[float]]:
    """The figures of a logged step by their names, and every rank's seconds of work per step: the same on every rank.

    `gradients` and `parameters` are this rank's `squares`. A collective of all ranks.
    """
    times = [own.data_wait, own.work, own.schedule]
    here = torch.tensor([*times, *_memory(grid.device)], dtype=torch.float64)
    row = torch.cat((here.to(grid.device), gradients, parameters))
    rows = row.new_empty(grid.world_size * len(row))
    dist.all_gather_into_tensor(rows, row)
    known = known_kinds()
    ranks, grads, params = rows.cpu().view(grid.world_size, -1).split((len(here), len(known), len(known)), dim=1)
    data_wait, work, schedule, *memory = ranks.T
    by_kind = dict(zip(known, grads.sum(0).sqrt().tolist(), strict=True))
    figures = {
        **{f"grad_norm/{name}": by_kind[name] for name in kinds(model)},
        "param_norm": math.sqrt(params.sum().item()),
        "data_wait_seconds": data_wait.max().item(),
        "pipeline_bubble": pipeline_bubble(work, schedule) if grid.pipeline_size > 1 else 0.0,
        "data_parallel_imbalance": data_parallel_imbalance(work, grid),
        **{name: used.max().item() for name, used in zip(_MEMORY, memory, strict=True)},
    }
    return figures, work.tolist()


def pipeline_bubble(work: Tensor, schedule: Tensor) -> float:
    """Share of the schedule in which ranks did not work, from each rank's seconds of both [world].

    The schedule is as long as that of the rank that ends last: an early end is idle time too.
    """
    longest = schedule.max().item()
    return min(1.0, max(0.0, 1 - work.mean().item() / longest)) if longest > 0 else 0.0


def data_parallel_imbalance(work: Tensor, grid: Grid) -> float:
    """Own work of the slowest replica over the mean of replicas, from each rank's seconds [world].

    A replica is as slow as the slowest of its ranks.
    """
    replicas = grid.axes.along("data", work).amax(1)
    mean = replicas.mean().item()
    return replicas.max().item() / mean if mean > 0 else 1.0


def _memory(device: torch.device) -> tuple[float, float, float]:
    """GiB allocated, reserved, and at the highest since the start; on a CPU of the process as a whole."""
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return used[0] / 2**30, used[1] / 2**30, torch.cuda.max_memory_allocated(device) / 2**30
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        resident, peak = (int(fields[name][0]) / 2**20 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):  # not Linux
        resident = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return resident, resident, peak

"""The figures of a logged step: norms, memory, pipeline bubble and data-parallel imbalance, from all ranks."""

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
from griffin.trainer.measuring.clock import RankTimes

_OTHER_KINDS = ("mlp", "norm", "embedding")
_MEMORY = ("memory_allocated_gib", "memory_reserved_gib", "memory_peak_gib")


def all_kinds() -> tuple[str, ...]:
    """All kinds of parameters with a gradient norm of their own, those of mixers first. The same on every rank."""
    return (*mixers.kinds(mixers.MIXERS.values()), *_OTHER_KINDS)


def kind_of(name: str) -> str:
    """The one of `all_kinds` that the tensor with this canonical name belongs to."""
    part = name.split(".")[2 if name.startswith("blocks.") else 0]
    part = "norm" if part.endswith("norm") else part
    assert part in all_kinds(), name
    return part


def model_kinds(model: ModelConfig) -> tuple[str, ...]:
    """Those of `all_kinds` that the model has."""
    return (*mixers.kinds(mixers.used(model.pattern)), *_OTHER_KINDS)


def is_counted(parameter: nn.Parameter, grid: Grid) -> bool:
    """Whether this rank's copy of a parameter counts in norms, so that each parameter counts once.

    The embedding's second copy, on the last pipeline stage, does not count. Of parameters that are replicated over
    tensor ranks, the copy of tensor rank 0 counts.
    """
    if getattr(parameter, "shared", False):
        return False
    return bool(parameter.tensor_model_parallel) or grid.tensor_rank == 0  # type: ignore[attr-defined]


def squares_by_kind(shards: Iterable[tuple[nn.Parameter, Tensor]], device: torch.device) -> Tensor:
    """Sums of squares of this rank's shards (float32) of parameters, by kind: float64 [all kinds]."""
    found: dict[str, list[Tensor]] = {}
    for parameter, shard in shards:
        if shard.numel():
            found.setdefault(kind_of(parameter.pieces[0].name), []).append(shard)  # type: ignore[attr-defined]
    kinds = all_kinds()
    sums = torch.zeros(len(kinds), dtype=torch.float64, device=device)
    for name, parts in found.items():
        sums[kinds.index(name)] = torch.stack(torch._foreach_norm(parts)).double().square().sum()
    return sums


def gather_rows(grid: Grid, gradient_squares: Tensor, weight_squares: Tensor, times: RankTimes) -> Tensor:
    """What `figures_of` needs of each rank, float64 [world, ...] on the device, without waiting for it. A collective.

    `gradient_squares` and `weight_squares` are this rank's `squares_by_kind`.
    """
    seconds = [times.data_wait, times.work, times.schedule]
    here = torch.tensor([*seconds, *_memory(grid.device)], dtype=torch.float64)
    row = torch.cat((here.to(grid.device, non_blocking=True), gradient_squares, weight_squares))
    rows = row.new_empty(grid.world_size * len(row))
    dist.all_gather_into_tensor(rows, row)
    return rows.view(grid.world_size, -1)


def figures_of(
    rows: Tensor, grid: Grid, model: ModelConfig, *, has_work: bool = True
) -> tuple[dict[str, float], list[float] | None]:
    """The figures of a logged step by name, and the seconds of own work per step of each rank.

    `rows` is what `gather_rows` returns, on the CPU. Without `has_work` the ranks' work was not timed.
    """
    kinds = all_kinds()
    ranks, grads, params = rows.split((rows.shape[1] - 2 * len(kinds), len(kinds), len(kinds)), dim=1)
    data_wait, work, schedule, *memory = ranks.T
    by_kind = dict(zip(kinds, grads.sum(0).sqrt().tolist(), strict=True))
    figures = {
        **{f"grad_norm/{name}": by_kind[name] for name in model_kinds(model)},
        "param_norm": math.sqrt(params.sum().item()),
        "data_wait_seconds": data_wait.max().item(),
        "pipeline_bubble": pipeline_bubble(work, schedule) if grid.pipeline_size > 1 else 0.0,
        **({"data_parallel_imbalance": data_parallel_imbalance(work, grid)} if has_work else {}),
        **{name: used.max().item() for name, used in zip(_MEMORY, memory, strict=True)},
    }
    return figures, work.tolist() if has_work else None


def pipeline_bubble(work: Tensor, schedule: Tensor) -> float:
    """Share of the pipeline schedule in which ranks were idle; `work` and `schedule` are seconds of each rank [world].

    The schedule lasts as long as that of the rank that ends last: what another rank waits after its end is idle time.
    """
    longest = schedule.max().item()
    return min(1.0, max(0.0, 1 - work.mean().item() / longest)) if longest > 0 else 0.0


def data_parallel_imbalance(work: Tensor, grid: Grid) -> float:
    """Own work of the slowest data-parallel replica, divided by the mean over replicas; `work` is seconds [world].

    A replica is as slow as the slowest of its ranks.
    """
    replicas = grid.axes.along("data", work).amax(1)
    mean = replicas.mean().item()
    return replicas.max().item() / mean if mean > 0 else 1.0


def _memory(device: torch.device) -> tuple[float, float, float]:
    """GiB allocated, reserved, and the peak since the start. On a CPU: of the whole process."""
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

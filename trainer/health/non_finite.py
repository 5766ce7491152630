"""Non-finite losses and gradients: the first affected parameter, and its ranks."""

from __future__ import annotations

from collections.abc import Sequence

from griffin.parallel.stage import Stage
from griffin.parallel.world.axes import rank_names
from griffin.parallel.world.grid import Grid
from griffin.parallel.world.ranks import RunError


class NonFiniteError(RunError):
    """The loss or a gradient is NaN or infinite. Raised on every rank before the optimizer changes a weight."""


def describe_non_finite(stages: Sequence[Stage], grid: Grid) -> str:
    """Name the first gradient that is not finite and its ranks. A collective; the same text on every rank."""
    mine = [
        piece.name
        for stage in stages
        for parameter in stage.parameters()
        for piece in parameter.pieces
        if not piece.view(parameter.main_grad, grid.tensor_size).isfinite().all()
    ]
    found = grid.all_gather(mine, list[str])
    offenders = sorted((_model_order(name), name) for names in found for name in names)
    if not offenders:
        return "every gradient is finite"
    name = offenders[0][1]
    ranks = [rank for rank, names in enumerate(found) if name in names]
    return (
        f"the first non-finite gradient is that of {name} on {rank_names(ranks)} "
        f"({len({n for _, n in offenders})} parameters in all)"
    )


def _model_order(name: str) -> tuple[int, str]:
    """Sort key of parameter names, from the input to the output of the model."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return int(parts[1]), name
    return (-1 if parts[0] == "embedding" else 1 << 30), name

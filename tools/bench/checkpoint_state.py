"""The random state that `griffin bench checkpoint` saves and loads: in a training, and as DTensors for DCP.

It is generated anew wherever it is needed, so that loaded values are never compared with those of the saving side.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from griffin.parallel.sharding import Piece
    from griffin.parallel.world.grid import Grid
    from griffin.trainer.step import Training

KINDS = ("weights", "exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 4 * len(KINDS)  # all are float32


def draw(kind: str, piece: Piece) -> Tensor:
    """Generate a global tensor: random float32 of the piece's shape, the same on every rank and in every layout."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}.{piece.name}".encode()))
    values = torch.empty(piece.shape)
    return values.uniform_(generator=generator) if kind == "exp_avg_sq" else values.normal_(generator=generator)


def drawn(kind: str, parameter: nn.Parameter, grid: Grid) -> Tensor:
    """Return a parameter's shard of the random tensors on this rank, flat; zeros in the vocabulary's padding."""
    import torch

    values = torch.zeros(parameter.shape)
    for piece in parameter.pieces:  # type: ignore[attr-defined]
        whole, part = draw(kind, piece), piece.view(values, grid.tensor_size)
        if piece.axis is not None:
            size, held = whole.shape[piece.axis], part.shape[piece.axis]
            first = min(grid.tensor_rank * held, size)
            count = min(held, size - first)
            whole, part = whole.narrow(piece.axis, first, count), part.narrow(piece.axis, 0, count)
        part.copy_(whole)
    return values.flatten()


def fill(training: Training, grid: Grid) -> None:
    """Set a training's weights and moments to the random state."""
    import torch

    with torch.no_grad():
        for parameter in _parameters(training):
            start, stop = training.optimizer.shard_range(parameter)
            if stop > start:
                weights, *moments = (drawn(kind, parameter, grid)[start:stop] for kind in KINDS)
                training.optimizer.set_shard_state(parameter, weights, torch.stack(moments))
        training.optimizer.gather_weights()
    training.continue_after(1, 1)


def require_loaded(training: Training, grid: Grid) -> None:
    """Raise RuntimeError unless a training's model and optimizer hold the random state bit by bit."""
    for parameter in _parameters(training):
        start, stop = training.optimizer.shard_range(parameter)
        held = training.optimizer.shard_state(parameter)
        assert held is not None, "without data parallelism a rank updates all of its parameters"
        names = ", ".join(piece.name for piece in parameter.pieces)  # type: ignore[attr-defined]
        for kind, value in zip(KINDS, held, strict=True):
            expected = drawn(kind, parameter, grid)
            require_same(f"griffin: {kind} of {names}", value, expected[start:stop])
            if kind == "weights":
                require_same(f"griffin: {names} of the model", parameter.detach().flatten(), expected)


def require_same(name: str, value: Tensor | None, expected: Tensor) -> None:
    import torch

    if value is None or not torch.equal(value.view(torch.int32), expected.view(torch.int32)):
        raise RuntimeError(f"{name} was not loaded as it was saved; no load was timed")


def _parameters(training: Training) -> Iterable[nn.Parameter]:
    return (parameter for stage in training.stages for parameter in stage.parameters())


class DcpState:
    """The same global tensors as DTensors over all ranks: sharded along dimension 0, or as for tensor parallelism."""

    def __init__(self, training: Training, grid: Grid, *, tensor_parallel: bool):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard

        from griffin.parallel.sharding import named_pieces

        self._mesh = init_device_mesh("cpu", (grid.world_size,))
        self._pieces = [piece for piece, _ in named_pieces(training.stages)]
        self._placements: dict[str, Any] = {
            piece.name: Shard(0) if not tensor_parallel else Replicate() if piece.axis is None else Shard(piece.axis)
            for piece in self._pieces
        }

    def state(self) -> dict[str, Any]:
        """Return the random state."""
        return {f"{kind}.{piece.name}": self._drawn(kind, piece) for kind in KINDS for piece in self._pieces}

    def empty(self) -> dict[str, Any]:
        """Return a state of NaNs to load into."""
        from torch.distributed.tensor import full

        return {
            f"{kind}.{piece.name}": full(
                piece.shape, float("nan"), device_mesh=self._mesh, placements=[self._placements[piece.name]]
            )
            for kind in KINDS
            for piece in self._pieces
        }

    def require_loaded(self, state: Mapping[str, Any]) -> None:
        """Raise RuntimeError unless a state equals the random one bit by bit."""
        for kind in KINDS:
            for piece in self._pieces:
                name = f"{kind}.{piece.name}"
                require_same(f"dcp: {name}", state[name].to_local(), self._drawn(kind, piece).to_local())

    def _drawn(self, kind: str, piece: Piece) -> Any:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(draw(kind, piece), self._mesh, [self._placements[piece.name]], src_data_rank=None)

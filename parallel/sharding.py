"""Layout-independent description of parameters: canonical names, global shapes, and shards of tensor-parallel ranks.

A parameter in memory may fuse several tensors, for example an MLP's gate and up projections. Each of these is a `Piece`
with a canonical name and a global shape, the same for every layout. Initialisation, gathering, checkpoints and export
use pieces only. The sharded axis of a piece consists of equal *atoms* (gate blocks, heads, rows); a rank holds whole
atoms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from griffin.parallel.world.grid import Grid, gather_bytes
from griffin.parallel.world.messages import ForgedError

# (sharded axis, global shape, a rank's shard)
Part = tuple[int | None, tuple[int, ...], Tensor]
# (shape of the draw, generator) -> float32 values
Init = Callable[[tuple[int, ...], torch.Generator], Tensor]

_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def normal(std: float) -> Init:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def decay(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Initialise RG-LRU's p (the paper's -Lambda): exp(-softplus(p)) lies in [.9, .999], and its square is uniform."""
    low, high = 0.9**2, 0.999**2
    squared = torch.rand(shape, generator=generator) * (high - low) + low + 1e-8
    return torch.expm1(-0.5 * squared.log()).log()  # softplus(p) = -log(squared) / 2


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One canonical tensor, and the place of its local shard in a parameter.

    `shape` is the global shape. `axis` is the sharded axis, divided into `atoms` equal parts; None means replicated
    over tensor ranks. `padded` is the size of the sharded axis in memory if that is larger than in `shape` (rows of the
    vocabulary's padding are zero and belong to no global tensor). The local shard starts at `start` along dimension
    `dim` of the parameter, and spans all its other dimensions.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    axis: int | None = None
    atoms: int = 1
    padded: int | None = None
    dim: int = 0
    start: int = 0

    def axis_size(self) -> int:
        assert self.axis is not None
        return self.padded or self.shape[self.axis]

    def local_range(self, tensor_rank: int, tensor_size: int) -> tuple[int, int]:
        """Return the atoms [first, last) of the sharded axis that a tensor rank holds."""
        assert self.atoms % tensor_size == 0, (self.name, self.atoms, tensor_size)
        count = self.atoms // tensor_size
        return tensor_rank * count, (tensor_rank + 1) * count

    def local_shape(self, tensor_size: int) -> tuple[int, ...]:
        if self.axis is None:
            return self.shape
        shape = list(self.shape)
        shape[self.axis] = self.axis_size() // tensor_size
        return tuple(shape)

    def view(self, value: Tensor, tensor_size: int) -> Tensor:
        """Return this piece's shard as a view of `value`, a tensor laid out like the parameter (or its gradient)."""
        part = value.narrow(self.dim, self.start, self.local_shape(tensor_size)[self.dim])
        assert part.shape == self.local_shape(tensor_size), (self.name, part.shape, self.local_shape(tensor_size))
        return part


def describe(
    parameter: nn.Parameter,
    *pieces: Piece,
    weight_decay: bool,
    tensor_sum: bool = False,
    sequence_parallel: bool = False,
    shared: bool = False,
) -> None:
    """Set a parameter's pieces and the attributes that megatron-core's optimizer and gradient reduction read.

    tensor_sum: replicated, but each tensor rank computes a partial gradient (key/value projection).
    sequence_parallel: replicated, and with sequence parallelism each tensor rank sees a shard of the tokens only.
    shared: second copy of a parameter that another pipeline stage owns (the tied embedding).
    """
    sharded = pieces[0].axis is not None
    attributes = {
        "pieces": pieces,
        "no_weight_decay": not weight_decay,
        "tensor_sum": tensor_sum,
        "sequence_parallel": sequence_parallel,
        "tensor_model_parallel": sharded,
        "partition_dim": pieces[0].axis if sharded else -1,
        "partition_stride": 1,
        "allreduce": True,
    }
    if shared:
        attributes["shared"] = True
    for name, value in attributes.items():
        setattr(parameter, name, value)


def named_pieces(modules: Iterable[nn.Module]) -> Iterator[tuple[Piece, nn.Parameter]]:
    """Yield all pieces of the modules with their parameters, except for the second copy of a tied embedding."""
    for module in modules:
        for parameter in module.parameters():
            if not getattr(parameter, "shared", False):
                for piece in parameter.pieces:  # type: ignore[attr-defined]
                    yield piece, parameter


def _generator(seed: int, name: str, atom: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{atom}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def initialize(modules: Iterable[nn.Module], grid: Grid, seed: int) -> None:
    """Initialise all parameters. The global tensors depend on the seed only, bitwise, and not on the layout.

    Every (name, atom) has its own random stream, so a rank draws only the atoms it holds. Values are drawn in float32
    on the CPU, then rounded to the parameter's dtype. (PyTorch guarantees equal streams on CPUs of the same kind.)
    """
    for module in modules:
        for parameter in module.parameters():
            for piece in parameter.pieces:  # type: ignore[attr-defined]
                _draw(piece, piece.view(parameter, grid.tensor_size), grid, seed)


def _draw(piece: Piece, out: Tensor, grid: Grid, seed: int) -> None:
    if piece.axis is None:
        out.copy_(piece.init(piece.shape, _generator(seed, piece.name, 0)))
        return
    if piece.init is zeros:
        out.zero_()
        return
    size = piece.axis_size() // piece.atoms
    shape = piece.local_shape(grid.tensor_size)
    atom_shape = (*shape[: piece.axis], size, *shape[piece.axis + 1 :])
    first, last = piece.local_range(grid.tensor_rank, grid.tensor_size)
    for place, atom in enumerate(range(first, last)):
        values = piece.init(atom_shape, _generator(seed, piece.name, atom))
        out.narrow(piece.axis, place * size, size).copy_(values)
    padding = last * size - piece.shape[piece.axis]
    if padding > 0:  # zero the padding rows that this rank holds
        held = min(padding, out.shape[piece.axis])
        out.narrow(piece.axis, out.shape[piece.axis] - held, held).zero_()


@torch.no_grad()
def load(modules: Iterable[nn.Module], grid: Grid, tensors: Mapping[str, Tensor]) -> None:
    """Copy this rank's shards of global tensors, by canonical name, into the parameters (rounded to their dtype).

    `tensors` holds the whole model on every rank. Padding of the vocabulary is zeroed. Raises ValueError, before any
    parameter is changed, if a name is missing or unknown or a shape differs.
    """
    held = [
        (piece, parameter)
        for module in modules
        for parameter in module.parameters()
        for piece in parameter.pieces  # type: ignore[attr-defined]
    ]
    known = grid.all_gather({piece.name for piece, _ in held}, set[str])
    if unknown := tensors.keys() - set().union(*known):
        raise ValueError(f"no parameter is called {', '.join(sorted(unknown))}")
    for piece, _ in held:
        if piece.name not in tensors or tensors[piece.name].shape != piece.shape:
            found = tuple(tensors[piece.name].shape) if piece.name in tensors else "none"
            raise ValueError(f"{piece.name}: must be a tensor of shape {piece.shape}, found {found}")
    for piece, parameter in held:
        part, value = piece.view(parameter, grid.tensor_size), tensors[piece.name]
        if piece.axis is None:
            part.copy_(value)
            continue
        # A rank may hold only padding of the vocabulary.
        first = min(part.shape[piece.axis] * grid.tensor_rank, piece.shape[piece.axis])
        rows = min(part.shape[piece.axis], piece.shape[piece.axis] - first)
        part.zero_()
        part.narrow(piece.axis, 0, rows).copy_(value.narrow(piece.axis, first, rows))


def gather(
    modules: Iterable[nn.Module],
    grid: Grid,
    value: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach(),
) -> dict[str, Tensor]:
    """Return the global tensors by canonical name, on the CPU, on every rank.

    `value` maps a parameter to the tensor to gather, of the same layout (`lambda p: p.main_grad` for gradients). The
    whole model must fit in every rank's memory: for tests and small models.
    """
    mine = {
        piece.name: (piece.axis, piece.shape, piece.view(value(parameter), grid.tensor_size).detach().cpu())
        for piece, parameter in named_pieces(modules)
    }
    everyone = _all_gather_parts(mine if grid.is_first_replica else {}, grid)
    parts: dict[str, list[Part]] = {}
    for held in everyone:  # in rank order, so the ranks of a tensor group follow one another
        for name, part in held.items():
            parts.setdefault(name, []).append(part)
    tensors = {}
    for name, found in sorted(parts.items()):
        axis, shape, first = found[0]
        if axis is None:
            tensors[name] = first.clone()
        else:
            tensors[name] = torch.cat([part for _, _, part in found], dim=axis).narrow(axis, 0, shape[axis]).clone()
    return tensors


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """Header of a shard whose bytes are sent separately."""

    name: str
    axis: int | None
    shape: tuple[int, ...]
    part_shape: tuple[int, ...]
    dtype: str


def _all_gather_parts(mine: Mapping[str, Part], grid: Grid) -> list[Mapping[str, Part]]:
    """Return every rank's shards by name, in rank order. ForgedError if bytes do not match their headers."""
    if grid.world_size == 1:
        return [mine]
    headers = [
        ShardHeader(name=name, axis=axis, shape=shape, part_shape=tuple(part.shape), dtype=str(part.dtype))
        for name, (axis, shape, part) in mine.items()
    ]
    values = b"".join(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for *_, part in mine.values())
    everyone = grid.all_gather(headers, list[ShardHeader])
    return [
        read_parts(each, received) for each, received in zip(everyone, gather_bytes(values, grid.device), strict=True)
    ]


def read_parts(headers: Sequence[ShardHeader], values: bytes) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    left = memoryview(bytearray(values))
    for header in headers:
        dtype = _DTYPES.get(header.dtype)
        size = math.prod(header.part_shape) * (dtype.itemsize if dtype else 0)
        if dtype is None or min(header.part_shape, default=0) < 0 or size > len(left):
            raise ForgedError(
                f"{header.name}: a peer sent bytes that are not a tensor {header.part_shape} of {header.dtype}"
            )
        value = torch.frombuffer(left[:size], dtype=dtype) if size else torch.empty(0, dtype=dtype)
        parts[header.name] = header.axis, header.shape, value.view(header.part_shape)
        left = left[size:]
    if left:
        raise ForgedError(f"a peer sent {len(left)} bytes that belong to no tensor")
    return parts

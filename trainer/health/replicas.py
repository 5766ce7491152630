"""Check that all copies of every weight are bitwise equal.

Data-parallel replicas hold copies of all weights, tensor ranks of replicated weights, and the first and last pipeline
stage of the embedding. Each optimizer step overwrites all weights from the shards of the master weights, so a corrupted
copy lasts until the next step. Copies are therefore compared after the forward and backward passes have used them, and
before the optimizer uses the gradients.
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from griffin.parallel.world.axes import rank_name
from griffin.parallel.world.grid import Grid
from griffin.parallel.world.ranks import RunError

EMBEDDING = "embedding.weight"
CHUNK = 1 << 22  # elements that are widened to 64 bits at a time
# Odd, so that multiplication modulo 2**64 loses no bit.
_FACTOR = 0x1E3779B97F4A7C15
_CHAIN = 0x5851F42D4C957F2D
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(RunError):
    """Copies of a weight differ. Raised on every rank, before the step changes a weight."""


@torch.no_grad()
def checksum(value: Tensor) -> Tensor:
    """Checksum of a tensor's bits, int64 []. It changes if any bit is flipped or any two elements are exchanged.

    Computed in integers modulo 2**64, so that it is the same on every device and in any order of summation.
    """
    bits = value.detach().reshape(-1).view(_BITS[value.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    weights = _weights(min(CHUNK, bits.numel()), value.device)
    for part in bits.split(CHUNK):
        total = total * _CHAIN + (part.long() * weights[: part.numel()]).sum()
    return total


def _weights(count: int, device: torch.device) -> Tensor:
    """Distinct odd numbers."""
    return torch.arange(count, dtype=torch.int64, device=device) * (2 * _FACTOR) + 1


@dataclass(frozen=True, kw_only=True)
class _RankChecksums:
    """The checksums of a rank's weights, sent to the other ranks."""

    rank: int
    host: str
    tensor_rank: int
    sums: dict[str, tuple[bool, int]]  # parameter -> (whether it is replicated over tensor ranks, checksum)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of the copies of weights."""

    differ: Tensor  # int64 [], the same on every rank: whether any copies differ; on the device, which may be at work
    parameters: Sequence[nn.Parameter]
    sums: Tensor  # checksums of this rank's parameters
    grid: Grid

    def fail(self, step: int) -> NoReturn:
        """Raise ReplicaError, naming parameters, ranks and hosts. A collective, for copies that differ."""
        checksums = _RankChecksums(
            rank=self.grid.rank,
            host=socket.gethostname(),
            tensor_rank=self.grid.tensor_rank,
            sums={
                _name(parameter): (_is_replicated(parameter), value)
                for parameter, value in zip(self.parameters, self.sums.tolist(), strict=True)
            },
        )
        text = _describe(self.grid.all_gather(checksums, _RankChecksums))
        raise ReplicaError(f"step {step}: {text}. No weight was changed by this step.")


def compare_replicas(modules: Sequence[nn.Module], grid: Grid) -> Comparison:
    """Compare the copies of the modules' weights, without waiting for the device. A collective, if there are any.

    Each rank reads its weights once and exchanges 16 bytes per parameter with its data-parallel peers.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if not parameters:
        none = torch.zeros((), dtype=torch.int64, device=grid.device)
        return Comparison(differ=none, parameters=(), sums=none[None], grid=grid)
    sums = torch.stack([checksum(parameter) for parameter in parameters])
    replicated = [index for index, parameter in enumerate(parameters) if _is_replicated(parameter)]
    differs = _differs(sums, grid.replica_group)
    if replicated and grid.tensor_size > 1:
        differs = differs | _differs(sums[replicated], grid.tensor_group)
    if grid.embedding_group is not None:
        embedding = [index for index, parameter in enumerate(parameters) if _name(parameter) == EMBEDDING]
        differs = differs | _differs(sums[embedding], grid.embedding_group)
    anywhere = differs.long()
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return Comparison(differ=anywhere, parameters=parameters, sums=sums, grid=grid)


def _differs(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whether the ranks of a group have different checksums, bool []."""
    ends = torch.stack((sums, ~sums))  # ~ reverses the order: one maximum finds both largest and smallest
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    return (ends[0] != ~ends[1]).any()


def _describe(ranks: Sequence[_RankChecksums]) -> str:
    copies: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)  # (name, tensor rank) -> rank -> checksum
    for checksums in ranks:
        for name, (is_replicated, value) in checksums.sums.items():
            copies[name, 0 if is_replicated else checksums.tensor_rank][checksums.rank] = value
    different = {key: values for key, values in copies.items() if len(set(values.values())) > 1}
    suspects: dict[tuple[tuple[int, ...], bool], list[str]] = defaultdict(list)
    for (name, _), values in different.items():
        (most, count), *rest = Counter(values.values()).most_common()
        is_clear = count > rest[0][1]
        differing = tuple(sorted(rank for rank, value in values.items() if not is_clear or value != most))
        suspects[differing, is_clear].append(name)
    lines = []
    for (differing, is_clear), names in suspects.items():
        who = ", ".join(rank_name(rank, ranks[rank].host) for rank in differing)
        more = f" and {len(names) - 1} more parameters" if len(names) > 1 else ""
        verb = f"differ{'s' * (len(differing) == 1)} from the other copies" if is_clear else "differ, with no majority"
        lines.append(f"{names[0]}{more}: the cop{'y' if len(differing) == 1 else 'ies'} of {who} {verb}")
    return "; ".join(lines)


def _is_replicated(parameter: nn.Parameter) -> bool:
    return parameter.pieces[0].axis is None  # type: ignore[attr-defined]


def _name(parameter: nn.Parameter) -> str:
    """Canonical names of all tensors that are fused into a parameter."""
    return " + ".join(piece.name for piece in parameter.pieces)  # type: ignore[attr-defined]

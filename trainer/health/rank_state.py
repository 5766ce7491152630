"""The current state of a rank, as another of its threads sees it: its stack and its collectives."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from griffin.parallel.world.axes import rank_name

_TRANSPARENT: set[CodeType] = set()  # code of wrappers, which are left out of stacks

RECENT = 30  # collectives of a rank that are listed


F = TypeVar("F", bound=Any)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """The last collective that a rank entered in one of its process groups."""

    group: str  # the group's name, the same on all of its ranks
    purpose: str  # megatron-core's description of the group
    operation: str  # "" if it has entered none
    sequence: int  # number of the collective within its group, the same on all ranks of the group
    pending: bool  # whether it has not ended

    def __str__(self) -> str:
        return f"{self.operation} number {self.sequence} of {self.purpose or 'group ' + self.group}"


@dataclass(frozen=True, kw_only=True)
class RankState:
    """The state that a rank reports of itself. It is sent as JSON."""

    rank: int
    host: str
    pid: int
    entered: int  # number of watched phases entered: how far the rank has come
    phase: str
    seconds: float  # since it entered or left that phase
    where: str  # place in its code
    communication: str  # the call of torch.distributed that it is in; "" if none
    collectives: tuple[Collective, ...]

    @property
    def name(self) -> str:
        return f"{rank_name(self.rank, self.host)} (pid {self.pid})"


def transparent(function: F) -> F:
    """Decorate a wrapper function: its frames are left out of reported stacks."""
    _TRANSPARENT.add(function.__code__)
    return function


def main_frames() -> list[FrameType]:
    """The stack of this process's main thread, innermost frame first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        if frame.f_code not in _TRANSPARENT:
            frames.append(frame)
        frame = frame.f_back
    return frames


def where(frames: list[FrameType]) -> str:
    """The innermost frame and the innermost frame of this project: "FUNCTION (FILE:LINE) in FUNCTION (FILE:LINE)"."""
    if not frames:
        return "nowhere"
    ours = next((frame for frame in frames if _module(frame).startswith("griffin.")), frames[0])
    chosen = frames[:1] if ours is frames[0] else [frames[0], ours]
    return " in ".join(f"{f.f_code.co_name} ({f.f_code.co_filename}:{f.f_lineno})" for f in chosen)


def communication(frames: list[FrameType]) -> str:
    """The innermost call of torch.distributed or of pipeline communication, with its group; "" if there is none."""
    for frame in frames:
        module, function = _module(frame), frame.f_code.co_name
        if module == "torch.distributed.distributed_c10d":
            group = frame.f_locals.get("group")
            purpose = group.group_desc if isinstance(group, dist.ProcessGroup) else "all ranks"
            return f"{function} of {purpose}"
        if module == "megatron.core.pipeline_parallel.p2p_communication":
            return f"{function} between pipeline stages"
    return ""


def recorded(device: torch.device) -> list[Mapping[str, Any]]:
    """Entries of PyTorch's flight recorder, oldest first; [] if it records nothing."""
    from torch._C import _distributed_c10d as c10d

    # NCCL has a recorder of its own, which is built for GPUs only.
    dump = getattr(c10d, "_dump_nccl_trace_json" if device.type == "cuda" else "_dump_fr_trace_json", None)
    return json.loads(dump(True, False)).get("entries", []) if dump is not None else []


def last_collectives(entries: list[Mapping[str, Any]]) -> tuple[Collective, ...]:
    """The last collective of each process group of this rank, from the entries of the flight recorder."""
    found = {
        name: Collective(group=name, purpose=purpose, operation="", sequence=0, pending=False)
        for name, purpose in _groups()
    }
    for entry in entries:
        name, purpose = entry["process_group"]
        if not entry["is_p2p"] and entry["collective_seq_id"] >= (found[name].sequence if name in found else 0):
            found[name] = Collective(
                group=name,
                purpose=purpose,
                operation=entry["profiling_name"].partition(":")[2] or entry["profiling_name"],
                sequence=entry["collective_seq_id"],
                pending=not entry["retired"] and entry["state"] != "completed",
            )
    return tuple(found.values())


def describe_entries(entries: list[Mapping[str, Any]]) -> str:
    """The newest entries of the flight recorder, a line each."""
    lines = []
    for entry in entries[-RECENT:]:
        name, purpose = entry["process_group"]
        number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
        state = "ended" if entry["retired"] or entry["state"] == "completed" else f"NOT ENDED ({entry['state']})"
        lines.append(f"{entry['profiling_name']} number {number} of {purpose or name} {entry['input_sizes']}: {state}")
    return "\n".join(lines) if lines else "none recorded"


def describe_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return "no GPU"
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"{torch.cuda.memory_allocated(device) / 2**30:.2f} GiB allocated, "
        f"{torch.cuda.memory_reserved(device) / 2**30:.2f} GiB reserved, "
        f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB free"
    )


def _groups() -> Iterator[tuple[str, str]]:
    with suppress(AttributeError):  # there is no public list of groups
        for group in dist.distributed_c10d._world.pg_map:
            if isinstance(group, dist.ProcessGroup):
                yield group.group_name, group.group_desc


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))

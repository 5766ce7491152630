"""Check that machines and control groups have memory for the staged state of all their ranks."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**62  # bytes; cgroup v1 writes "no limit" as nearly 2**63


@dataclass(frozen=True, kw_only=True)
class Request:
    """The memory that one rank needs, and that is available to it."""

    rank: int
    host: str
    size: int  # bytes
    left: Mapping[str, int]  # `memory_left` of its process


def memory_left(root: Path = Path("/")) -> dict[str, int]:
    """Bytes available to this process, for its machine and for every enclosing control group that has a limit.

    The keys identify the machine or group: processes that share it, and no others, get the same key.
    """
    try:
        machine = (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        machine = socket.gethostname()
    available = re.search(r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(encoding="ascii"), re.M)
    left = {f"machine {machine}": int(available[1]) * 1024} if available is not None else {}
    for folder, limit, used, caches in _groups(root):
        # A group's files may vanish meanwhile, and not every system fills them in.
        with suppress(OSError, ValueError, KeyError):
            most = (folder / limit).read_text(encoding="ascii").strip()
            if most == "max" or int(most) >= _UNLIMITED:
                continue
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            counts = dict(line.split() for line in lines)
            # The page cache is charged to the group as well, but is reclaimed when memory is needed.
            cached = sum(int(counts[name]) for name in caches)
            taken = int((folder / used).read_text(encoding="ascii"))
            left[f"group {folder.stat().st_ino} of {machine}"] = max(0, int(most) - taken + cached)
    return left


def shortages(requests: Sequence[Request]) -> list[str]:
    """One message for each machine or control group that has too little memory for all requests."""
    problems = []
    for name in sorted({name for request in requests for name in request.left}):
        sharing = [request for request in requests if name in request.left]
        size, left = sum(request.size for request in sharing), min(request.left[name] for request in sharing)
        if size > left:
            ranks = ", ".join(f"rank {request.rank}" for request in sharing)
            where = "are available" if name.startswith("machine") else "are left in their control group"
            problems.append(
                f"{ranks} on {sharing[0].host}: no memory for {size / 2**30:.2f} GiB of staged state, "
                f"which checkpoints are saved from: {left / 2**30:.2f} GiB {where}"
            )
    return problems


def _groups(root: Path) -> Iterator[tuple[Path, str, str, tuple[str, str]]]:
    """Folders of the control groups around this process, with the names of their limit and usage files and counters."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
            caches = ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            caches = ("total_inactive_file", "total_active_file")
        else:
            continue
        # In a container the path may be the host's, and only the mount itself is visible.
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield group, limit, used, caches
            if group == mount:
                break

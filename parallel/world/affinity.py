"""Processor cores of a rank: those of the NUMA node that its GPU is attached to."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

SYSFS = Path("/sys")


def bind_near(device: torch.device, sysfs: Path = SYSFS) -> set[int]:
    """Bind this process, all its threads and what it starts from now on to the cores near `device`, and return them.

    Memory of a farther NUMA node costs a rank time. The cores that this process may use already, as by `srun
    --cpu-bind` or a cgroup, are only ever narrowed. Nothing changes, and the set is empty, for a device that is no
    GPU, where the machine does not say which cores are near, and where none of those may be used.
    """
    if device.type != "cuda":
        return set()
    near = near_cores(_pci_address(device), sysfs) & os.sched_getaffinity(0)
    if near:
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):  # it has just ended, or a container forbids it: a run goes on without
                os.sched_setaffinity(int(thread), near)
    return near


def near_cores(pci_address: str, sysfs: Path = SYSFS) -> set[int]:
    """Numbers of the cores of the NUMA node of a PCI device, such as "0000:3b:00.0"; none where it is not known."""
    try:
        ranges = (sysfs / "bus/pci/devices" / pci_address / "local_cpulist").read_text(encoding="ascii")
        return set().union(*map(_cores, ranges.strip().split(",")))
    except (OSError, ValueError):
        return set()


def _cores(text: str) -> range:
    """ "4-7" or "4"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _pci_address(device: torch.device) -> str:
    """Such as "0000:3b:00.0"; "" where this PyTorch does not tell."""
    card: Any = torch.cuda.get_device_properties(device)  # torch's annotations lack these three
    try:
        return f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
    except AttributeError:
        return ""

"""CPU affinity: binds a rank to the cores of its GPU's NUMA node."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

SYSFS = Path("/sys")


def bind_near(device: torch.device, sysfs: Path = SYSFS) -> set[int]:
    """Bind this process, all its threads and future children to the cores near `device`, and return these cores.

    Access to memory of another NUMA node is slower. The current affinity, set by `srun --cpu-bind` or a cgroup for
    example, is only narrowed. Nothing changes and the set is empty if `device` is not a GPU, if the machine does not
    report the near cores, or if none of them is allowed.
    """
    if device.type != "cuda":
        return set()
    near = near_cores(_pci_address(device), sysfs) & os.sched_getaffinity(0)
    if near:
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):  # the thread has ended, or a container forbids it: continue unbound
                os.sched_setaffinity(int(thread), near)
    return near


def near_cores(pci_address: str, sysfs: Path = SYSFS) -> set[int]:
    """Return the cores of the NUMA node of a PCI device such as "0000:3b:00.0"; an empty set if it is unknown."""
    try:
        ranges = (sysfs / "bus/pci/devices" / pci_address / "local_cpulist").read_text(encoding="ascii")
        return set().union(*map(_cores, ranges.strip().split(",")))
    except (OSError, ValueError):
        return set()


def _cores(text: str) -> range:
    """Parse "4-7" or "4"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _pci_address(device: torch.device) -> str:
    """Return the PCI address, such as "0000:3b:00.0"; "" if this PyTorch does not report it."""
    card: Any = torch.cuda.get_device_properties(device)  # torch's annotations lack the three attributes
    try:
        return f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
    except AttributeError:
        return ""

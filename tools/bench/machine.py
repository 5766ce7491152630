"""Describe the machine and the versions that a benchmark ran with."""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from importlib.metadata import version


def versions(threads: int) -> str:
    """Return date, machine and versions of a comparison with transformers."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    return (
        f"{time.strftime('%Y-%m-%d')}; {processor()}, {threads} threads; python {platform.python_version()}, {packages}"
    )


def processor() -> str:
    """Return the name of the CPU."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

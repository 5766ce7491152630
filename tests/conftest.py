from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.ranks import RankPool

# The same examples on every run; a slow machine is no failure.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

MEMORY = Path("/dev/shm")
MEMORY_BYTES = 4 * 2**30  # what the tests keep at a time is far less


def pytest_configure(config: pytest.Config) -> None:
    """Ranks, layouts and kernels are compared on CPUs, also where there are GPUs; `-m gpu` runs what needs one.

    Temporary folders lie in memory where it can hold them: thousands of small files are synchronised, which takes
    minutes on a slow disk.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # Triton's programs run on CPUs, in its interpreter
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > MEMORY_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.stop()

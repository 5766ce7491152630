from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.ranks import RankPool

# The same examples on every run; a slow machine is no failure.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Ranks and layouts are compared on CPUs, also where there are GPUs; `-m gpu` runs the tests that need one."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.stop()

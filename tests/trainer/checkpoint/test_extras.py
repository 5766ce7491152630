"""State that a feature adds to checkpoints, in a header's `extras`: saved, restored, and carried along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import rank_grid
from griffin.parallel.world.ranks import Ranks
from griffin.trainer.checkpoint.checkpoints import Position
from griffin.trainer.checkpoint.manifest import read_manifest
from griffin.trainer.run.step_name import step_name
from griffin.trainer.step import Training
from tests.layout_checkpoints import checkpoints, source, steps
from tests.layouts import GLOBAL_BATCH, make_config
from tests.ranks import RankPool


class Counter:
    """Something with state; notes what it was restored from."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.restored: list[tuple[Any, bool]] = []

    def state(self) -> dict[str, int]:
        return {"value": self.value}

    def restore(self, state: dict[str, int], *, values_only: bool = False) -> None:
        self.restored.append((state, values_only))
        self.value = state["value"]


def save_resume_rewind(ranks: Ranks, root: Path) -> list[list[tuple[Any, bool]]]:
    """Saves step 1 of a run with two counters, then steps 2 and 3 of one that resumes with the first and a new one.

    What the later two counters were restored from, in the resume and in a rewind to step 2.
    """
    config = make_config("griffin", ParallelConfig(), steps=9)
    with rank_grid(config.parallel, ranks) as grid:
        training = Training(config, grid)
        with checkpoints(config, grid, training, root, extras={"kept": Counter(5), "left": Counter(6)}) as saved:
            steps(training, grid, 0, 1)
            saved.finish(Position(1, GLOBAL_BATCH))
        kept, new = Counter(0), Counter(7)
        with checkpoints(config, grid, training, root, extras={"kept": kept, "new": new}) as saved:
            assert saved.load(source(root / step_name(1), 1)) == Position(1, GLOBAL_BATCH)
            for step in (2, 3):
                kept.value += 10
                steps(training, grid, step - 1, step)
                saved.finish(Position(step, step * GLOBAL_BATCH))
            rewound = saved.rewind()
            assert rewound is not None
            assert rewound.step == 2
        return [kept.restored, new.restored]


def test_state_is_saved_restored_and_carried_along(rank_pool: RankPool, tmp_path: Path) -> None:
    kept, new = rank_pool.run(save_resume_rewind, 1, tmp_path)[0]
    assert kept == [({"value": 5}, False), ({"value": 15}, True)]
    assert new == [({"value": 7}, True)]  # the checkpoint that it resumed from did not know it
    extras = [read_manifest(tmp_path / step_name(step)).extras for step in (1, 2, 3)]
    left, added = {"value": 6}, {"value": 7}
    assert extras == [
        {"kept": {"value": 5}, "left": left},
        {"kept": {"value": 15}, "left": left, "new": added},
        {"kept": {"value": 25}, "left": left, "new": added},
    ]

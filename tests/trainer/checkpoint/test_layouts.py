"""State saved from any layout loads bitwise into any other, and training resumes as if it had never stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr

from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import rank_grid
from griffin.trainer.checkpoint import arrays
from griffin.trainer.checkpoint.checkpoints import Position
from griffin.trainer.checkpoint.manifest import read_manifest
from griffin.trainer.run.step_name import step_name
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training
from tests.closeness import assert_all_close
from tests.layout_checkpoints import checkpoints, source, state_of, steps
from tests.layouts import LAYOUTS, LEARNING_RATE, RANKS, make_config
from tests.ranks import RankPool

NAMES = ("one", "tp2", "pp2", "dp2", "tp2-pp2", "pp2-interleaved", "tp2-dp2")
QUICK = ("tp2-dp2",)
MORE = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
WITH_DTYPES = [
    pytest.param(name, dtype, marks=[] if (name, dtype) == ("tp2-dp2", "float32") else pytest.mark.slow)
    for name in NAMES
    for dtype in ("float32", "bfloat16")
]
SAVED_AFTER, STEPS = 3, 23  # 20 more steps after the checkpoint


def layout(name: str) -> ParallelConfig:
    return LAYOUTS.get(name, ParallelConfig())


def world_size(name: str) -> int:
    return RANKS.get(name, 1)


@contextmanager
def small_chunks() -> Iterator[None]:
    """Cut tensors above 1 KiB into chunks of at most 4 KiB, so that a small model has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", 4096)
        patch.setattr(arrays, "WHOLE_BYTES", 1024)
        yield


def train_and_save(ranks: Any, config: Config, root: Path, go_on: int) -> dict[str, Any]:
    with small_chunks(), rank_grid(config.parallel, ranks) as grid:
        training = Training(config, grid)
        with checkpoints(config, grid, training, root) as saved:
            before = steps(training, grid, 0, SAVED_AFTER)
            saved.save(Position(SAVED_AFTER, SAVED_AFTER * config.train.global_batch))
            state = state_of(training, grid)
            after = steps(training, grid, SAVED_AFTER, go_on)  # while the checkpoint is written
            saved.finish(Position(go_on, go_on * config.train.global_batch))
            return {"state": state, "losses": before + after, "final": state_of(training, grid)}


def load_and_save(ranks: Any, config: Config, folders: list[Path], root: Path) -> list[dict[str, torch.Tensor]]:
    """Load each checkpoint, save it again below `root`, and return the states after loading."""
    with small_chunks(), rank_grid(config.parallel, ranks) as grid:
        training, states = Training(config, grid), []
        for number, folder in enumerate(folders):
            with checkpoints(config, grid, training, root / str(number)) as saved:
                position = saved.load(source(folder, SAVED_AFTER))
                states.append(state_of(training, grid))
                saved.finish(position)
        return states if grid.is_first_rank else []


def resume(ranks: Any, config: Config, folder: Path, root: Path) -> dict[str, Any]:
    with small_chunks(), rank_grid(config.parallel, ranks) as grid:
        training = Training(config, grid)
        with checkpoints(config, grid, training, root) as saved:
            position = saved.load(source(folder, SAVED_AFTER))
            assert position == Position(SAVED_AFTER, SAVED_AFTER * config.train.global_batch)
            return {"losses": steps(training, grid, SAVED_AFTER, STEPS), "final": state_of(training, grid)}


@pytest.fixture(scope="module")
def saved(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a training of 23 steps saved after step 3, once for each layout and dtype."""
    known: dict[Any, Any] = {}

    def run(name: str, dtype: str = "float32") -> tuple[Path, dict[str, Any]]:
        if (name, dtype) not in known:
            root = tmp_path_factory.mktemp(f"{name}-{dtype}")
            config = make_config("griffin", layout(name), dtype=dtype, steps=STEPS)
            answers = rank_pool.run(train_and_save, world_size(name), config, root, STEPS)
            known[name, dtype] = (root / step_name(SAVED_AFTER), answers[0])
        return known[name, dtype]

    return run


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every array as stock zarr reads it, with bfloat16 views of bfloat16 arrays."""
    found = dict(zarr.open_group(folder, mode="r").arrays())
    values = {name: np.asarray(array[:]) for name, array in found.items()}
    return {
        name: value.view(ml_dtypes.bfloat16) if found[name].attrs["dtype"] == "bfloat16" else value
        for name, value in values.items()
    }


@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES)
def test_a_checkpoint_is_the_state_that_was_saved(saved: Any, name: str, dtype: str) -> None:
    folder, answer = saved(name, dtype)
    stored = read_all(folder)
    state = answer["state"]
    if dtype == "float32":  # the model's weights are the master weights
        for key in [key for key in state if key.startswith(arrays.MASTER)]:
            assert torch.equal(state.pop(key), state[key.replace(arrays.MASTER, arrays.MODEL)]), key
    assert stored.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(stored[key].astype(np.float32), value.float().numpy(), err_msg=key)
    assert len(list((folder / "model.blocks.0.mlp.up.weight").glob("c.*"))) > 1, "the case needs several chunks"


@pytest.mark.parametrize("target", MORE)
def test_any_layout_loads_what_any_other_saved(rank_pool: RankPool, saved: Any, target: str, tmp_path: Path) -> None:
    names = NAMES if target not in QUICK else QUICK  # all pairs in the slow suite
    folders = [saved(name)[0] for name in names]
    config = make_config("griffin", layout(target), steps=STEPS)
    loaded = rank_pool.run(load_and_save, world_size(target), config, folders, tmp_path)[0]
    for number, (name, folder) in enumerate(zip(names, folders, strict=True)):
        for key, value in saved(name)[1]["state"].items():
            assert torch.equal(loaded[number][key], value), (name, key)
        again = read_manifest(tmp_path / str(number) / step_name(SAVED_AFTER))
        assert again.files == read_manifest(folder).files, name  # every byte, by size and checksum


@pytest.mark.slow
@pytest.mark.parametrize("target", QUICK)
def test_the_quick_layout_loads_what_the_others_saved(
    rank_pool: RankPool, saved: Any, target: str, tmp_path: Path
) -> None:
    names = [name for name in NAMES if name not in QUICK]
    config = make_config("griffin", layout(target), steps=STEPS)
    loaded = rank_pool.run(load_and_save, world_size(target), config, [saved(name)[0] for name in names], tmp_path)[0]
    for number, name in enumerate(names):
        for key, value in saved(name)[1]["state"].items():
            assert torch.equal(loaded[number][key], value), (name, key)


@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES)
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(
    rank_pool: RankPool, saved: Any, name: str, dtype: str, tmp_path: Path
) -> None:
    folder, uninterrupted = saved(name, dtype)
    config = make_config("griffin", layout(name), dtype=dtype, steps=STEPS)
    resumed = rank_pool.run(resume, world_size(name), config, folder, tmp_path)[0]
    assert resumed["losses"] == uninterrupted["losses"][SAVED_AFTER:]
    for key, value in uninterrupted["final"].items():
        assert torch.equal(resumed["final"][key], value), key


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=[] if (name, target) == ("tp2-dp2", "pp2-interleaved") else pytest.mark.slow)
        for name, target in [
            *itertools.pairwise(NAMES),
            ("tp2-dp2", "one"),
            ("tp2-dp2", "pp2-interleaved"),
            ("pp2-interleaved", "tp2"),
        ]
        if name != target
    ],
)
def test_a_training_resumes_in_another_layout(
    rank_pool: RankPool, saved: Any, name: str, target: str, tmp_path: Path
) -> None:
    folder, uninterrupted = saved(name)
    config = make_config("griffin", layout(target), steps=STEPS)
    resumed = rank_pool.run(resume, world_size(target), config, folder, tmp_path)[0]
    # Sums in another order: float32 rounding (6e-8) carried over 20 Adam steps.
    torch.testing.assert_close(resumed["losses"], uninterrupted["losses"][SAVED_AFTER:], rtol=1e-5, atol=0)
    weights = {key: value for key, value in resumed["final"].items() if key.startswith("model.")}
    # Where a gradient is near zero, Adam turns its rounding into steps of up to the learning rate.
    assert_all_close(weights, {key: uninterrupted["final"][key] for key in weights}, atol=0.002 * LEARNING_RATE * STEPS)

"""Runs with spikes: skipped updates and rewinds give bitwise the expected runs."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import zarr

from griffin.parallel import sharding
from griffin.parallel.world.ranks import Ranks
from griffin.trainer.checkpoint.manifest import Manifest, read_manifest, to_text
from griffin.trainer.data.dataset import Samples
from griffin.trainer.health.spikes import SpikeError
from griffin.trainer.run.attempts import read_end
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.step_name import step_name
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training
from tests.ranks import RankError, RankPool
from tests.small_runs import kill_this_process, metrics, run, saved_files, saved_steps, series, write_config

STEPS = 16
BATCH = 8
WINDOW = 8


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("spikes"))


def config(path: Path, spike: str, **settings: Any) -> Config:
    stated: dict[str, Any] = {"checkpoint.interval": 4, "log.interval": 1, "train.eval_interval": 0}
    stated |= {"train.steps": STEPS, "train.spike": spike, "train.spike_window": WINDOW, "train.spike_deviations": 3}
    stated |= {name.replace("__", "."): value for name, value in settings.items()}
    return load_config(path, [f"--{name}={value}" for name, value in stated.items()])


@contextmanager
def random_bytes(steps: tuple[int, ...]) -> Iterator[None]:
    """Replace samples that `steps` take in an undisturbed run by random bytes."""
    draw = Samples.__getitem__

    def disturbed(samples: Samples, n: int) -> dict[str, torch.Tensor]:
        sample = draw(samples, n)
        if n // BATCH + 1 in steps:
            noise = torch.randint(256, sample["labels"].shape, generator=torch.Generator().manual_seed(n))
            sample = sample | {"labels": noise}
        return sample

    with mock.patch.object(Samples, "__getitem__", disturbed):
        yield


def disturbed_run(ranks: Ranks, config: Config, run_dir: Path, steps: tuple[int, ...] = (10,)) -> bool:
    with random_bytes(steps):
        return run(ranks, config, run_dir)


def poisoned_run(ranks: Ranks, config: Config, run_dir: Path, step: int, rank: int) -> bool:
    """Make a gradient of one rank NaN in one step."""
    make_step = Training.step

    def poisoned(training: Training, *args: Any, **others: Any) -> Any:
        handle = None
        if ranks.rank == rank and training.steps_done + 1 == step:
            (parameter,) = [
                parameter
                for piece, parameter in sharding.named_pieces(training.stages)
                if piece.name == "blocks.1.mlp.down.weight"
            ]
            # Linear layers add their gradient to it themselves.
            total: Any = parameter.main_grad  # type: ignore[attr-defined]
            handle = parameter.register_hook(lambda _: setattr(parameter, "main_grad", total.fill_(math.nan)))
        try:
            return make_step(training, *args, **others)
        finally:
            if handle is not None:
                handle.remove()

    with mock.patch.object(Training, "step", poisoned):
        return run(ranks, config, run_dir)


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    group = zarr.open_group(run_dir / "checkpoints" / step_name(step), mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}  # type: ignore[index]


@pytest.fixture(scope="module")
def skipped(rank_pool: RankPool, config_path: Path) -> Path:
    """A run of 2 ranks that saves before and after its spike, in step 10."""
    run_dir = config_path.parent / "skipped"
    settings = config(config_path, "skip", checkpoint__interval=1)
    assert rank_pool.run(disturbed_run, 2, settings, run_dir) == [False, False]
    return run_dir


def test_skip_skips_the_update(skipped: Path) -> None:
    before, after, later = (arrays(skipped, step) for step in (9, 10, 11))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    assert any((after[name] != later[name]).any() for name in after)
    losses = series(skipped, "loss")
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[10] > max(losses[step] for step in (8, 9, 11, 12)) + 2, "the spike is seen"
    assert series(skipped, "learning_rate")[10] != series(skipped, "learning_rate")[9], "the schedule goes on"
    manifest = read_manifest(skipped / "checkpoints" / step_name(STEPS))
    assert (manifest.samples, manifest.optimizer and manifest.optimizer["step"]) == (STEPS * BATCH, STEPS - 1)


def test_skip_is_recorded(skipped: Path) -> None:
    (line,) = ledger(skipped)
    assert {key: line[key] for key in ("attempt", "step", "action", "kind", "samples")} == {
        "attempt": 1,
        "step": 10,
        "action": "skip",
        "kind": "loss",
        "samples": [9 * BATCH, 10 * BATCH],
    }
    assert line["loss"] == series(skipped, "loss")[10]
    assert f"step 10: SPIKE: {line['text']}; update skipped\n" in (skipped / "console.log").read_text()
    assert series(skipped, "skipped_updates")[10] == 1


def test_without_detection_the_update_is_made(rank_pool: RankPool, config_path: Path, skipped: Path) -> None:
    run_dir = config_path.parent / "off"
    rank_pool.run(disturbed_run, 2, config(config_path, "off"), run_dir)
    assert not (run_dir / "ledger.jsonl").exists()
    off, skip = series(run_dir, "loss"), series(skipped, "loss")
    assert all(off[step] == skip[step] for step in range(1, 11))
    assert off[11] != skip[11]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
        (2, {"train.overlap": "on"}),
        (1, {}),
    ],
    ids=["tp2-pp2", "dp2-overlap", "one"],
)
def test_every_layout_skips_the_same(
    rank_pool: RankPool, config_path: Path, tmp_path: Path, skipped: Path, world_size: int, settings: dict[str, Any]
) -> None:
    stated = {name.replace(".", "__"): value for name, value in settings.items()}
    rank_pool.run(disturbed_run, world_size, config(config_path, "skip", **stated), tmp_path / "run")
    assert [line["step"] for line in ledger(tmp_path / "run")] == [10]
    expected = series(skipped, "loss")
    for step, loss in series(tmp_path / "run", "loss").items():
        assert loss == pytest.approx(expected[step], rel=1e-5)  # float32 sums in another order


@pytest.mark.slow
def test_run_stopped_after_a_skip_resumes_exactly(
    rank_pool: RankPool, config_path: Path, tmp_path: Path, skipped: Path
) -> None:
    """The bits are the same, and so is the detection of a second spike, which uses steps before the stop."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run_dir, ends in ((whole, (STEPS,)), (parts, (11, STEPS))):
        for end in ends:
            # The end is the schedule's too, unless it is constant.
            settings = config(
                config_path, "skip", train__steps=end, optimizer__schedule="constant", checkpoint__interval=0
            )
            rank_pool.run(disturbed_run, 2, settings, run_dir, (10, 13))
        assert [line["step"] for line in ledger(run_dir)] == [10, 13]
    assert saved_files(parts, STEPS) == saved_files(whole, STEPS)
    assert series(parts, "loss") == series(whole, "loss")


def test_rewind_continues_with_the_data_after_the_spike(rank_pool: RankPool, config_path: Path, tmp_path: Path) -> None:
    rewound, expected = tmp_path / "rewound", tmp_path / "expected"
    rank_pool.run(disturbed_run, 2, config(config_path, "rewind"), rewound)
    (line,) = ledger(rewound)
    assert (line["step"], line["action"], line["back_to"], line["samples"]) == (10, "rewind", 8, [72, 80])
    assert (
        f"step 10: SPIKE: {line['text']}; rewound to step 8; training continues"
        in (rewound / "console.log").read_text()
    )
    logged = [line["step"] for line in metrics(rewound) if "loss" in line]
    assert logged == [*range(1, 10), *range(9, STEPS + 1)]
    assert series(rewound, "rewinds")[10] == 1
    manifest = read_manifest(rewound / "checkpoints" / step_name(STEPS))
    assert manifest.samples == 80 + (STEPS - 8) * BATCH

    # A run that was saved in step 8, and goes on with the samples from 80 on.
    rank_pool.run(run, 2, config(config_path, "off", train__steps=8, optimizer__decay_steps=14), expected)
    shutil.rmtree(expected / "checkpoints" / step_name(8))
    shutil.copytree(rewound / "checkpoints" / step_name(8), expected / "checkpoints" / step_name(8))
    edit(expected / "checkpoints" / step_name(8), samples=80)
    rank_pool.run(run, 2, config(config_path, "off"), expected)
    assert {step: loss for step, loss in series(expected, "loss").items() if step > 8} == {
        step: loss for step, loss in series(rewound, "loss").items() if step > 8
    }
    assert saved_files(expected, STEPS) == saved_files(rewound, STEPS)


@pytest.mark.slow
def test_rewind_to_an_older_checkpoint_if_the_newest_spikes_again(
    rank_pool: RankPool, config_path: Path, tmp_path: Path
) -> None:
    """The batch of step 10 is noise, and so is the next one, which follows at step 9."""
    run_dir = tmp_path / "run"
    rank_pool.run(disturbed_run, 2, config(config_path, "rewind", train__overlap="on"), run_dir, (10, 11))
    lines = ledger(run_dir)
    assert [(line["step"], line["back_to"]) for line in lines] == [(10, 8), (9, 4)]
    (kept,) = [path.name for path in (run_dir / "checkpoints").iterdir() if "spiked" in path.name]
    assert kept == "step-00000008.spiked-1"
    console = (run_dir / "console.log").read_text()
    assert f"The later checkpoint leads to a spike again; it is kept as {kept}\n" in console
    assert saved_steps(run_dir) == [4, 8, 12, 16]
    assert series(run_dir, "rewinds")[STEPS] == 2
    trained = [line["trained_seconds"] for line in metrics(run_dir) if line["step"] == 5 and "loss" in line]
    assert len(trained) == 2
    manifest = read_manifest(run_dir / "checkpoints" / step_name(STEPS))
    assert manifest.samples == 88 + (STEPS - 4) * BATCH
    assert manifest.optimizer is not None
    assert manifest.optimizer["step"] == STEPS


def killed_run(ranks: Ranks, config: Config, run_dir: Path, steps: tuple[int, ...], at: int) -> bool:
    """Like `disturbed_run`, but the process is killed before its `at`-th step."""
    make_step, count = Training.step, itertools.count(1)

    def step(training: Training, *args: Any, **others: Any) -> Any:
        if next(count) == at:
            kill_this_process()
        return make_step(training, *args, **others)

    with mock.patch.object(Training, "step", step):
        return disturbed_run(ranks, config, run_dir, steps)


@pytest.mark.parametrize("at", [11, 13])
@pytest.mark.slow
def test_run_killed_after_a_rewind_ends_with_the_same_bits(
    rank_pool: RankPool, config_path: Path, tmp_path: Path, at: int
) -> None:
    """The 11th step is the first one after the rewind to step 8, the 13th the second one after the rewind to step 4."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = config(config_path, "rewind")
    rank_pool.run(disturbed_run, 1, settings, whole, (10, 11))
    with pytest.raises(RankError, match="the process died"):
        rank_pool.run(killed_run, 1, settings, killed, (10, 11), at)
    rank_pool.run(disturbed_run, 1, settings, killed, (10, 11))
    assert saved_files(killed, STEPS) == saved_files(whole, STEPS)
    assert series(killed, "rewinds")[STEPS] == series(whole, "rewinds")[STEPS] == 2


@pytest.mark.slow
def test_rewind_to_a_checkpoint_of_an_earlier_attempt(rank_pool: RankPool, config_path: Path, tmp_path: Path) -> None:
    """The newest checkpoint is lost meanwhile, and a later one appears that was incomplete at the start."""
    run_dir = tmp_path / "run"
    settings = {"optimizer__schedule": "constant"}
    rank_pool.run(run, 1, config(config_path, "rewind", train__steps=8, **settings), run_dir)
    later = run_dir / "checkpoints" / step_name(12)
    shutil.copytree(run_dir / "checkpoints" / step_name(8), later)
    edit(later, step=12)
    (later / "zarr.json").rename(later / "lost")
    rank_pool.run(run_that_loses_a_checkpoint, 1, config(config_path, "rewind", **settings), run_dir)
    (line,) = ledger(run_dir)
    assert (line["attempt"], line["step"], line["back_to"]) == (2, 10, 4)
    assert series(run_dir, "trained_seconds")[STEPS] > 0


def run_that_loses_a_checkpoint(ranks: Ranks, config: Config, run_dir: Path) -> bool:
    root, make_step = run_dir / "checkpoints", Training.step

    def step(training: Training, *args: Any, **others: Any) -> Any:
        if training.steps_done == 9 and (root / step_name(8)).exists():
            shutil.rmtree(root / step_name(8))
            (root / step_name(12) / "lost").rename(root / step_name(12) / "zarr.json")
        return make_step(training, *args, **others)

    with mock.patch.object(Training, "step", step):
        return disturbed_run(ranks, config, run_dir)


def edit(folder: Path, **changes: Any) -> None:
    manifest = read_manifest(folder)
    (folder / "manifest.json").write_text(to_text(Manifest(**vars(manifest) | changes)))


@pytest.mark.slow
def test_tensorboard_shows_the_valid_curve(rank_pool: RankPool, config_path: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rank_pool.run(disturbed_run, 2, config(config_path, "rewind"), tmp_path / "run")
    events = EventAccumulator(str(RunFolder(tmp_path / "run").events))
    events.Reload()
    shown = {scalar.step: scalar.value for scalar in events.Scalars("1_loss/loss")}
    assert len(events.Scalars("1_loss/loss")) == STEPS
    assert shown == pytest.approx(series(tmp_path / "run", "loss"), rel=1e-6)  # TensorBoard keeps float32


@pytest.mark.slow
def test_without_a_checkpoint_rewind_skips(rank_pool: RankPool, config_path: Path, tmp_path: Path) -> None:
    settings = config(config_path, "rewind", checkpoint__interval=12)
    rank_pool.run(disturbed_run, 2, settings, tmp_path / "run")
    (line,) = ledger(tmp_path / "run")
    assert line["action"] == "skip"
    assert (
        "update skipped, as there is no checkpoint to rewind to yet" in (tmp_path / "run" / "console.log").read_text()
    )


@pytest.mark.parametrize("spike", ["skip", pytest.param("rewind", marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_a_number(rank_pool: RankPool, config_path: Path, tmp_path: Path, spike: str) -> None:
    """It is named and handled; with rewinds again and again, since the step comes again."""
    settings = config(config_path, spike, parallel__tensor=2, train__steps=8)
    if spike == "skip":
        rank_pool.run(poisoned_run, 4, settings, tmp_path / "run", 6, 3)
    else:
        with pytest.raises(RankError, match=r"SpikeError: step 6: .*than train.spike_limit = 10 spikes within"):
            rank_pool.run(poisoned_run, 4, settings, tmp_path / "run", 6, 3)
    lines = ledger(tmp_path / "run")
    assert [line["action"] for line in lines] == (["skip"] if spike == "skip" else ["rewind"] * 10 + ["end"])
    for line in lines:
        assert (line["step"], line["kind"], line["grad_norm"]) == (6, "not finite", None)
        assert "the first non-finite gradient is that of blocks.1.mlp.down.weight on ranks " in line["text"]
    if spike == "skip":
        assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run") if "loss" in line)
        assert series(tmp_path / "run", "skipped_updates") == {step: int(step >= 6) for step in range(1, 9)}


def test_too_many_end_the_run(rank_pool: RankPool, config_path: Path, tmp_path: Path) -> None:
    settings = config(config_path, "skip", train__spike_limit=2)
    with pytest.raises(RankError, match=SpikeError.__name__):
        rank_pool.run(disturbed_run, 2, settings, tmp_path / "run", (10, 11, 12, 13))
    assert [(line["step"], line["action"]) for line in ledger(tmp_path / "run")] == [
        (10, "skip"),
        (11, "skip"),
        (12, "end"),
    ]
    assert (
        "more than train.spike_limit = 2 spikes within train.spike_window = 8 steps"
        in (tmp_path / "run" / "console.log").read_text()
    )
    end = read_end(RunFolder(tmp_path / "run"))
    assert end is not None
    assert (end.why, end.exit_code, end.step) == ("failed", 1, 11)
    assert end.error.startswith("SpikeError: step 12: ")

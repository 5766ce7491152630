"""Runs that are stopped, killed, damaged and moved, and resume exactly."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from griffin.parallel.world.ranks import Ranks
from griffin.tools.cli import main
from griffin.tools.commands.train import add_parser, check
from griffin.trainer.checkpoint import manifest as manifests
from griffin.trainer.checkpoint.arrays import EXP_AVG, EXP_AVG_SQ, MASTER, MODEL
from griffin.trainer.checkpoint.manifest import read_manifest, verify
from griffin.trainer.checkpoint.source import InitFrom
from griffin.trainer.checkpoint.steps import newest_complete
from griffin.trainer.reporting.charts import grouped
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.step_name import step_name
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config
from tests.ranks import RankError, RankPool
from tests.small_runs import (
    Watch,
    die_amid_save,
    die_once_saved,
    meet,
    metrics,
    notes,
    run,
    saved_files,
    saved_steps,
    series,
    signal_this_process,
    snapshot,
    wait_for,
    write_config,
)

STEPS = 12


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("resume"))


def config(path: Path, **settings: Any) -> Config:
    """Settings of 12 steps on 2 data-parallel ranks or another layout, saved every 4 steps, all logged."""
    stated: dict[str, Any] = {"checkpoint.interval": 4, "log.interval": 1, "train.eval_interval": STEPS}
    stated |= {name.replace("__", "."): value for name, value in settings.items()}
    return load_config(path, [f"--{name}={value}" for name, value in stated.items()])


@pytest.fixture(scope="module")
def uninterrupted(rank_pool: RankPool, config_path: Path) -> Path:
    """A run of 2 ranks that evaluates at its end on the samples of its first step."""
    run_dir = config_path.parent / "uninterrupted"
    evaluation = {"data__eval": config_path.parent / "train", "train__eval_batches": 1}
    assert rank_pool.run(run, 2, config(config_path, **evaluation), run_dir) == [False, False]
    return run_dir


def go_on(
    pool: RankPool, world_size: int, settings: Config, run_dir: Path, init_from: InitFrom | None = None, **watch: Any
) -> list[bool]:
    return pool.run(run, world_size, settings, run_dir, init_from, Watch(**watch))


def dies(pool: RankPool, world_size: int, settings: Config, run_dir: Path, **watch: Any) -> None:
    with pytest.raises(RankError, match="the process died"):
        go_on(pool, world_size, settings, run_dir, **watch)


def assert_same_end(run_dir: Path, other: Path, step: int = STEPS) -> None:
    """Assert that two runs end with the same bits: weights, optimizer state and metadata."""
    assert saved_files(run_dir, step) == saved_files(other, step)
    verify(run_dir / "checkpoints" / step_name(step))


def text(run_dir: Path) -> str:
    return (run_dir / "console.log").read_text()


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Read by stock zarr."""
    group = zarr.open_group(run_dir / "checkpoints" / step_name(step), mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


@pytest.fixture(scope="module")
def killed(rank_pool: RankPool, config_path: Path, uninterrupted: Path) -> Path:
    """A run that was killed twice, first between two saves and then during one; with its state after the first."""
    run_dir = config_path.parent / "killed"
    settings = config(config_path, checkpoint__keep_last=1, checkpoint__keep_every=8)
    folder = config_path.parent / "killed-notes"
    for attempt in (1, 2, 3):
        (folder / str(attempt)).mkdir(parents=True)
    at_step: dict[tuple[int, int], Any] = {(rank, 7): partial(die_once_saved, run_dir, 4) for rank in (0, 1)}
    dies(rank_pool, 2, settings, run_dir, at_step=at_step, notes=folder / "1")
    assert saved_steps(run_dir) == [4]
    shutil.copytree(run_dir, config_path.parent / "killed-once")

    at_step = {(rank, 10): partial(die_amid_save, run_dir, 8) for rank in (0, 1)}
    dies(rank_pool, 2, settings, run_dir, at_step=at_step, notes=folder / "2", slow=0.02)
    assert len(list((run_dir / "checkpoints").glob("step-00000008.*.tmp"))) == 1
    newest, damaged = newest_complete(run_dir / "checkpoints")
    assert newest == run_dir / "checkpoints/step-00000004"
    assert damaged == []
    verify(newest)

    assert go_on(rank_pool, 2, settings, run_dir, notes=folder / "3") == [False, False]
    return run_dir


def test_run_killed_twice_ends_with_the_same_bits(killed: Path, uninterrupted: Path) -> None:
    expected = series(uninterrupted, "loss")
    losses = [(line["attempt"], line["step"], line["loss"]) for line in metrics(killed) if "loss" in line]
    steps = [(1, step) for step in range(1, 7)] + [(2, step) for step in range(5, 10)]
    assert [(attempt, step) for attempt, step, _ in losses] == steps + [(3, step) for step in range(5, 13)]
    assert [loss for _, _, loss in losses] == [expected[step] for _, step, _ in losses]
    assert series(killed, "tokens") == series(uninterrupted, "tokens")
    assert_same_end(killed, uninterrupted)
    assert text(killed).count(f"Weights: step 4 of {killed} (the run's own folder)") == 2


def test_run_killed_twice_trains_on_every_sample_once(killed: Path) -> None:
    attempts = [notes(killed.parent / "killed-notes" / str(attempt), range(2)) for attempt in (1, 2, 3)]
    assert [list(attempt) for attempt in attempts] == [[*range(1, 7)], [*range(5, 10)], [*range(5, 13)]]
    for attempt in attempts:
        for step, numbers in attempt.items():
            assert numbers == list(range(8 * (step - 1), 8 * step))


@pytest.mark.slow
def test_longer_run_keeps_its_schedule(
    rank_pool: RankPool, config_path: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Other ranks, which have not read the run folder, follow rank 0."""
    path = tmp_path / "config.toml"
    path.write_text(config_path.read_text().replace("warmup_steps = 2\n", ""))
    assert config(path).optimizer.warmup_steps == 1
    runs = [Path(shutil.copytree(uninterrupted, tmp_path / name)) for name in ("run", "told")]
    settings = ["--train.steps=40", "--checkpoint.interval=4", "--log.interval=1", "--train.eval_interval=0"]
    command = argparse.ArgumentParser()
    add_parser(command.add_subparsers())
    args = command.parse_args(["train", str(path), "--run-dir", str(runs[0])])
    args.overrides = settings
    kept, _, _ = check(args, 2)
    assert (kept.optimizer.warmup_steps, kept.optimizer.decay_steps) == (2, 10)
    assert check(args, 2, makes_folder=False)[0].optimizer.warmup_steps == 4
    stops = {(0, 13): partial(signal_this_process, signal.SIGTERM)}
    assert rank_pool.run(run_of, 2, [kept, load_config(path, settings)], runs[0], stops) == [True, True]
    told = load_config(path, [*settings, "--optimizer.warmup_steps=2", "--optimizer.decay_steps=10"])
    assert rank_pool.run(run_of, 2, [told, told], runs[1], stops) == [True, True]
    assert_same_end(runs[0], runs[1], 14)
    assert list(series(runs[0], "learning_rate").values())[-2:] == pytest.approx([1e-3, 1e-3])
    assert ", train.steps 12 -> 40, " in text(runs[0])
    assert "optimizer." not in text(runs[0]).partition("Changed since then: ")[2].partition("\n")[0]
    assert "Learning rate: its decay ends at step 12; later steps keep optimizer.min_learning_rate = 0.001" in (
        text(runs[0])
    )


def run_of(ranks: Ranks, configs: list[Config], run_dir: Path, at_step: dict[tuple[int, int], Any]) -> bool:
    """A rank with its own config."""
    return run(ranks, configs[ranks.rank], run_dir, None, Watch(at_step=at_step))


def test_checkpoints_that_are_kept(killed: Path, uninterrupted: Path) -> None:
    assert saved_steps(uninterrupted) == [4, 8, 12]
    assert saved_steps(killed) == [8, 12]  # the last one, and multiples of 8
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]


def test_saves_are_logged(uninterrupted: Path) -> None:
    for key in ("checkpoint_stall_seconds", "checkpoint_seconds", "checkpoint_bytes"):
        logged = series(uninterrupted, key)
        assert list(logged) == [4, 8, 12]
        assert all(value > 0 for value in logged.values())
    chunks = sum(record.size for name, record in saved_files(uninterrupted, 4).items() if "/c" in name)
    assert series(uninterrupted, "checkpoint_bytes")[4] == chunks
    assert all(line["attempt"] == 1 for line in metrics(uninterrupted))


def test_curves_continue_where_an_attempt_resumes(killed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(RunFolder(killed).events))
    events.Reload()
    figures = {grouped(key): key for line in metrics(killed) for key in line}
    curves = {
        figures[tag]: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert [step for step, _ in curves["loss"]] == list(range(1, 13))
    for tag, curve in curves.items():
        # The last attempt that logged a step; TensorBoard keeps float32.
        assert dict(curve) == pytest.approx(series(killed, tag), rel=1e-6), tag


def test_killed_run_resumes_in_another_layout(
    rank_pool: RankPool, config_path: Path, killed: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(killed.with_name("killed-once"), tmp_path / "run")
    settings = config(config_path, parallel__tensor=2, parallel__pipeline=2)
    assert go_on(rank_pool, 4, settings, run_dir) == [False] * 4
    losses, expected = series(run_dir, "loss"), series(uninterrupted, "loss")
    assert list(losses) == list(expected)
    for step in range(5, STEPS + 1):
        assert losses[step] == pytest.approx(expected[step], rel=1e-5)  # float32 sums in another order
    assert "Changed since then: parallel.tensor 1 -> 2, parallel.pipeline 1 -> 2" in text(run_dir)


def test_init_from_all_continues_in_another_folder(
    rank_pool: RankPool, config_path: Path, killed: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    origin, run_dir, settings = killed.with_name("killed-once"), tmp_path / "run", config(config_path)
    init_from = InitFrom(path=origin, everything=True)
    before = snapshot(origin)
    assert go_on(rank_pool, 2, settings, run_dir, init_from) == [False, False]
    expected = series(uninterrupted, "loss")
    assert series(run_dir, "loss") == {step: expected[step] for step in range(5, STEPS + 1)}
    assert_same_end(run_dir, uninterrupted)
    assert {line["attempt"] for line in metrics(run_dir)} == {1}
    assert snapshot(origin) == before

    # Now it has checkpoints of its own, and nothing left to do.
    before = snapshot(run_dir / "checkpoints")
    assert go_on(rank_pool, 2, settings, run_dir, init_from) == [False, False]
    assert snapshot(run_dir / "checkpoints") == before
    assert (
        f"Weights: step 12 of {run_dir} (the run's own folder; --init-from {origin} is for its first start only)"
        in (text(run_dir))
    )
    assert "Nothing is left to do: step 12 of 12 is saved." in text(run_dir)


def test_init_from_weights_begins_anew(
    rank_pool: RankPool, config_path: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    settings = config(config_path, train__steps=1)
    init_from = InitFrom(path=uninterrupted, everything=False)
    assert go_on(rank_pool, 1, settings, tmp_path / "run", init_from) == [False]
    (loss,) = series(tmp_path / "run", "loss").values()
    # The weights of the end on the samples of the first step; another layout's float32 sums.
    assert loss == pytest.approx(series(uninterrupted, "eval_loss")[STEPS], rel=1e-5)
    assert loss < series(uninterrupted, "loss")[1] - 1
    assert series(tmp_path / "run", "learning_rate")[1] == series(uninterrupted, "learning_rate")[1]
    begun = read_manifest(tmp_path / "run/checkpoints" / step_name(1))
    assert (begun.samples, begun.optimizer and begun.optimizer["step"]) == (8, 1)
    found = arrays(tmp_path / "run", 1)
    for name, exp_avg in found.items():
        if name.startswith(f"{EXP_AVG}."):  # of the first gradient alone: (1 - beta) times it, and its square
            gradient = exp_avg.astype(np.float64) / (1 - settings.optimizer.beta1)
            exp_avg_sq = found[name.replace(EXP_AVG, EXP_AVG_SQ)]
            # Float32 rounding; squares below its normal numbers are flushed.
            np.testing.assert_allclose(
                exp_avg_sq, (1 - settings.optimizer.beta2) * gradient**2, rtol=1e-5, atol=1e-37, err_msg=name
            )


def test_other_layouts_and_batches_skip_and_repeat_no_sample(
    rank_pool: RankPool, config_path: Path, tmp_path: Path
) -> None:
    """1 rank, killed after step 6 with step 4 saved; 2 ranks with batches of 16, stopped after step 7; 4 to the end."""
    run_dir, settings = tmp_path / "run", partial(config, config_path, train__steps=9)
    for world_size in (1, 2, 4):
        (tmp_path / str(world_size)).mkdir()
    dies(rank_pool, 1, settings(), run_dir, notes=tmp_path / "1", at_step={(0, 7): partial(die_once_saved, run_dir, 4)})
    at_step = {(1, 6): partial(signal_this_process, signal.SIGUSR1)}
    larger = settings(train__global_batch=16)
    assert go_on(rank_pool, 2, larger, run_dir, notes=tmp_path / "2", at_step=at_step) == [True, True]
    assert saved_steps(run_dir) == [4, 7]
    assert go_on(rank_pool, 4, settings(), run_dir, notes=tmp_path / "4") == [False] * 4
    assert "Changed since then: train.global_batch 8 -> 16" in text(run_dir)

    attempts = {world_size: notes(tmp_path / str(world_size), range(world_size)) for world_size in (1, 2, 4)}
    assert [list(attempt) for attempt in attempts.values()] == [[1, 2, 3, 4, 5, 6], [5, 6, 7], [8, 9]]
    remaining = [attempts[1][step] for step in (1, 2, 3, 4)] + list(attempts[2].values()) + list(attempts[4].values())
    assert [len(numbers) for numbers in remaining] == [8] * 4 + [16] * 3 + [8] * 2
    assert list(itertools.chain(*remaining)) == list(range(96))  # each once, in the order of the steps
    assert read_manifest(run_dir / "checkpoints" / step_name(9)).samples == 96
    assert series(run_dir, "tokens")[9] == 96 * 32


def test_float32_resumes_from_the_master_weights_of_bfloat16(
    rank_pool: RankPool, config_path: Path, tmp_path: Path
) -> None:
    half, full = tmp_path / "half", tmp_path / "full"
    assert go_on(rank_pool, 1, config(config_path, train__dtype="bfloat16", train__steps=2), half) == [False]
    still = config(config_path, train__steps=1, optimizer__learning_rate=1e-30)
    assert go_on(rank_pool, 1, still, full, InitFrom(path=half, everything=False)) == [False]
    stored, found = arrays(half, 2), arrays(full, 1)
    names = [name.removeprefix(f"{MODEL}.") for name in found if name.startswith(f"{MODEL}.")]
    assert len(names) > 20
    for name in names:
        master = stored[f"{MASTER}.{name}"]
        np.testing.assert_allclose(found[f"{MODEL}.{name}"], master, rtol=0, atol=1e-25, err_msg=name)
        lowest_bits = master.view(np.uint32) & 0xFFFF
        assert lowest_bits.any(), "bfloat16 could hold these weights"


def cut_short(run_dir: Path, origin: Path) -> Path:
    """A copy of the uninterrupted run as it was after step 8."""
    shutil.copytree(origin, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / step_name(12))
    return run_dir / "checkpoints" / step_name(8)


def test_truncated_chunk_of_the_newest_checkpoint_is_skipped(
    rank_pool: RankPool, config_path: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    newest = cut_short(run_dir, uninterrupted)
    chunk = newest / "optimizer.exp_avg.embedding.weight" / "c.0.0"
    size = chunk.stat().st_size
    os.truncate(chunk, size - 1)
    assert go_on(rank_pool, 2, config(config_path), run_dir) == [False, False]
    said = text(run_dir)
    assert f"DAMAGED CHECKPOINT, skipped: {chunk} has {size - 1:,} bytes instead of {size:,}" in said
    assert f"Weights: step 4 of {run_dir} (the run's own folder)" in said
    assert_same_end(run_dir, uninterrupted, 8)
    assert_same_end(run_dir, uninterrupted, 12)
    assert (run_dir / "checkpoints/step-00000008.damaged-1").is_dir()


def test_a_flipped_bit_in_the_newest_checkpoint_stops_the_start(
    rank_pool: RankPool, config_path: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    chunk = cut_short(run_dir, uninterrupted) / "optimizer.exp_avg.embedding.weight" / "c.0.0"
    content = bytearray(chunk.read_bytes())
    content[1000] ^= 1
    chunk.write_bytes(content)
    before, logged = snapshot(run_dir / "checkpoints"), metrics(run_dir)
    with pytest.raises(RankError) as error:
        go_on(rank_pool, 2, config(config_path), run_dir)
    assert str(chunk) in str(error.value)
    assert "CheckpointError" in str(error.value)
    assert snapshot(run_dir / "checkpoints") == before
    assert metrics(run_dir) == logged


def test_arrays_of_another_model_are_refused(
    rank_pool: RankPool, config_path: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Settings that the checkpoint's config does not have."""
    folder = shutil.copytree(uninterrupted / "checkpoints" / step_name(12), tmp_path / "checkpoint")
    stored = read_manifest(folder)
    known = dict(stored.arrays)
    embedding, norm = (known.pop(f"model.{name}.weight") for name in ("embedding", "final_norm"))
    wide = replace(embedding, tensor=replace(embedding.tensor, shape=(257, 48)), chunks=(257, 48))
    other = replace(norm, tensor=replace(norm.tensor, name="norm.weight"))
    (folder / norm.name).rename(folder / other.name)
    files = {path.replace(f"{norm.name}/", f"{other.name}/"): record for path, record in stored.files.items()}
    changed = replace(stored, arrays=known | {array.name: array for array in (wide, other)}, files=files)
    (folder / manifests.MANIFEST).write_text(manifests.to_text(changed))
    init_from = InitFrom(path=folder, everything=False)
    with pytest.raises(RankError) as error:
        go_on(rank_pool, 1, config(config_path), tmp_path / "run", init_from)
    differences = [
        "model.embedding.weight is (257, 48) there, (257, 32) here",
        "model.final_norm.weight is missing there, (32,) here",
        "model.norm.weight is (32,) there, missing here",
    ]
    assert f"ValueError: the checkpoint of step 12 is of another model: {'; '.join(differences)}\n" in str(error.value)
    assert not RunFolder(tmp_path / "run").metrics.exists()


def test_two_runs_on_one_folder(
    rank_pool: RankPool, config_path: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused, naming the owner of the folder; the first is not disturbed."""

    def contents() -> dict[Path, bytes]:  # the owner touches its lock
        return {path: content for path, (_, content) in snapshot(run_dir).items()}

    run_dir, arrived, released = (tmp_path / name for name in ("run", "arrived", "released"))
    at_step = {(0, 2): partial(meet, arrived, released)}
    with ThreadPoolExecutor() as threads:
        first = threads.submit(go_on, rank_pool, 2, config(config_path), run_dir, at_step=at_step)
        try:
            wait_for(arrived.exists)
            owner = json.loads(RunFolder(run_dir).lock.read_text())
            before = contents()
            assert main(["train", str(RunFolder(run_dir).config), "--run-dir", str(run_dir)]) == 2
            assert contents() == before
        finally:
            released.touch()
        assert first.result(120) == [False, False]
    refusal = capsys.readouterr().err
    assert refusal.startswith(f"griffin: error: {run_dir}/lock: another run writes this folder: ")
    assert f" on {socket.gethostname()} (process {owner['pid']}, since " in refusal
    assert_same_end(run_dir, uninterrupted)
    assert not RunFolder(run_dir).lock.exists()

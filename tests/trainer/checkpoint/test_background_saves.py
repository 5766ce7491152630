"""Background saves in whole runs: they do not stall training, and training survives failed ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from griffin.trainer.checkpoint.manifest import verify
from griffin.trainer.checkpoint.saving.saver import Saver
from griffin.trainer.checkpoint.steps import newest_complete
from griffin.trainer.run.step_name import step_name
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config
from tests.ranks import RankPool
from tests.small_runs import (
    Watch,
    continue_saving,
    continue_saving_in,
    launch,
    metrics,
    run,
    saved_files,
    saved_steps,
    series,
    stop_saving,
    wait_until_saved,
    write_config,
)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("saves"))


def config(path: Path, steps: int, interval: int) -> Config:
    """For one rank, with every step logged."""
    settings = {"train.steps": steps, "checkpoint.interval": interval, "log.interval": 1, "train.eval_interval": 0}
    return load_config(path, [f"--{name}={value}" for name, value in settings.items()])


def test_training_continues_during_a_save(rank_pool: RankPool, config_path: Path, tmp_path: Path) -> None:
    """The saving process is stopped during two saves: for two steps, and for longer than an interval."""
    run_dir, settings = tmp_path / "run", config(config_path, steps=16, interval=4)
    watch = Watch(
        at_save={4: stop_saving, 8: stop_saving},
        at_step={
            (0, 7): continue_saving,
            (0, 8): partial(wait_until_saved, run_dir, 4),
            (0, 16): partial(wait_until_saved, run_dir, 12),
        },
        at_wait={8: partial(continue_saving_in, 1.0)},
    )
    rank_pool.run(run, 1, settings, run_dir, None, watch)
    lines = [(line["step"], key) for line in metrics(run_dir) for key in line]
    for step, meanwhile in ((4, (5, 6)), (8, (9, 10, 11, 12))):
        begun, ended = lines.index((step, "checkpoint_stall_seconds")), lines.index((step, "checkpoint_seconds"))
        trained = [done for done, key in lines[begun:ended] if key == "loss"]
        assert tuple(trained[: len(meanwhile)]) == meanwhile
    stalls = series(run_dir, "checkpoint_stall_seconds")
    assert list(stalls) == [4, 8, 12, 16]
    assert stalls[12] >= 1.0  # the next save had to wait for the one that took so long
    assert max(stalls[8], stalls[16]) < 1.0  # the others' staging takes milliseconds

    # The state that was staged is saved, not that of later steps.
    rank_pool.run(run, 1, settings, tmp_path / "undisturbed", None)
    for step in (4, 8, 12, 16):
        assert saved_files(run_dir, step) == saved_files(tmp_path / "undisturbed", step)


def replace_folder(root: Path, saver: Saver) -> None:
    """Put a file in its place."""
    if root.is_dir():
        root.rename(root.with_name("away"))
        root.touch()


def restore_folder(root: Path, step: int, saver: Saver) -> None:
    """Wait until the save after that of `step` has failed, and put the folder back."""
    root.unlink()
    root.with_name("away").rename(root)
    assert newest_complete(root) == (root / step_name(step), [])


def test_a_folder_that_cannot_be_written(config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    root = run_dir / "checkpoints"
    watch = Watch(
        at_save={
            4: partial(replace_folder, root),
            6: partial(restore_folder, root, 2),
            8: partial(replace_folder, root),  # at the end of the training
        }
    )
    assert launch(1, config(config_path, steps=8, interval=2), run_dir, watch) == 1
    said = (run_dir / "console.log").read_text()
    assert said.count("CHECKPOINT FAILED") == 3
    assert said.count(f"CHECKPOINT FAILED: step 4: {root}: Not a directory\n") == 1
    assert said.count(f"CHECKPOINT FAILED: step 8: {root}: Not a directory\n") == 2  # tried again
    refusal = f"SaveError: step 8 could not be saved: {root}: Not a directory\n"
    assert said.endswith(refusal)
    error = capsys.readouterr().err
    assert error == f"griffin: rank 0 of 1 failed (exit code 1)\n{refusal}"
    assert list(series(run_dir, "loss")) == list(range(1, 9))
    assert list(series(run_dir, "checkpoint_seconds")) == [2, 6]

    root.unlink()
    root.with_name("away").rename(root)
    assert saved_steps(run_dir) == [2, 6]
    assert not list(root.glob("*.tmp"))
    losses = series(run_dir, "loss")
    assert launch(1, config(config_path, steps=8, interval=2), run_dir) == 0
    assert series(run_dir, "loss") == losses  # steps 7 and 8 made again
    assert saved_steps(run_dir) == [2, 6, 8]


def mount(*words: Any) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, timeout=30)


def make_read_only(root: Path, saver: Saver) -> None:
    mount("--bind", root, root)
    mount("-o", "remount,ro,bind", root)


def put_full_disk_over(root: Path, saver: Saver) -> None:
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", root)


def unmount(root: Path, step: int, saver: Saver) -> None:
    assert not list(root.glob("*.tmp"))
    subprocess.run(["umount", str(root)], check=True, timeout=30)
    assert newest_complete(root) == (root / step_name(step), [])


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("mount") is None, reason="needs to mount file systems")
def test_a_read_only_folder_and_a_full_disk(rank_pool: RankPool, config_path: Path, tmp_path: Path) -> None:
    try:
        put_full_disk_over(tmp_path, None)  # type: ignore[arg-type]
        subprocess.run(["umount", str(tmp_path)], check=True)
    except subprocess.CalledProcessError:
        pytest.skip("may not mount file systems")
    run_dir = tmp_path / "run"
    root = run_dir / "checkpoints"
    watch = Watch(
        at_save={
            4: partial(make_read_only, root),
            6: partial(unmount, root, 2),
            8: partial(put_full_disk_over, root),
            10: partial(unmount, root, 6),
        }
    )
    try:
        assert rank_pool.run(run, 1, config(config_path, steps=10, interval=2), run_dir, None, watch) == [False]
    finally:
        subprocess.run(["umount", "--quiet", str(root)], capture_output=True)
    failures = [line for line in (run_dir / "console.log").read_text().splitlines() if "CHECKPOINT FAILED" in line]
    aside = rf"{re.escape(str(root))}/step-00000004\.[0-9a-f]+\.tmp"
    assert re.fullmatch(rf"CHECKPOINT FAILED: step 4: {aside}: Read-only file system", failures[0])
    assert failures[1].startswith("CHECKPOINT FAILED: step 8: rank 0 on 127.0.0.1: ")
    assert re.search(rf"{re.escape(str(root))}/step-00000008\.[0-9a-f]+\.tmp/", failures[1])
    assert "No space left on device" in failures[1]
    assert len(failures) == 2
    assert list(series(run_dir, "loss")) == list(range(1, 11))
    assert saved_steps(run_dir) == [2, 6, 10]
    for step in (2, 6, 10):
        verify(root / step_name(step))

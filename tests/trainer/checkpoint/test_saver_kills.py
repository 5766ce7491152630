"""Killed and failed saves: earlier checkpoints are intact, no incomplete step passes, and the next save works."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from griffin.trainer.checkpoint.arrays import MODEL, ArraySpec
from griffin.trainer.checkpoint.saving import saver as saver_module
from griffin.trainer.checkpoint.saving.saver import Outcome
from griffin.trainer.checkpoint.steps import newest_complete
from tests import saving_process
from tests.saving import Layout, State, Team, assert_holds, random_state

KILLED = "the saving process of rank {} on 127.0.0.1 was killed by SIGKILL"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For the files that control saving processes, and for their checkpoints: in memory where there is such a folder,
    since a disk that others use makes saves slow, and what a process leaves when it is killed is the same."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        monkeypatch.setattr(saver_module, "PROGRAM", saving_process.code(Path(name)))
        yield Path(name)


def assert_newest(root: Path, step: int, state: State) -> None:
    path, damaged = newest_complete(root)
    assert path is not None
    assert path.name == f"step-{step:08d}"
    assert damaged == []
    assert_holds(path, state, "float32")


def kill_at(team: Team, folder: Path, points: list[int], step: int) -> int:
    """Kill rank 0's process before each of the file operations, counted within one save, and save again each time.

    Returns how often the checkpoint stood nevertheless.
    """
    stood = 0
    good_step, good_state = step - 1, random_state(step - 1)
    for point in points:
        (folder / "kill").write_text(str(point))
        state = random_state(step)
        outcomes = team.save(step, state)
        (folder / "kill").unlink()
        if outcomes[0] is not None and outcomes[0].path is not None:  # committed before the kill
            good_step, good_state = step, state
            stood += 1
            assert [(outcome.error, outcome.path) for outcome in outcomes if outcome] == [
                (None, outcomes[0].path)
            ] * team.layout.size
        else:
            for rank, outcome in enumerate(outcomes):
                assert outcome is not None
                assert outcome.path is None
                lost = "lost the saving process of rank 0 on 127.0.0.1"
                assert outcome.error is not None
                assert outcome.error == KILLED.format(0) if rank == 0 else outcome.error.startswith(lost)
        assert_newest(team.root, good_step, good_state)
        good_step, good_state = step + 1, random_state(step + 1)
        outcome = team.save(good_step, good_state)[0]
        assert outcome is not None
        assert outcome.error is None
        assert newest_complete(team.root) == (outcome.path, [])
        assert not [path for path in team.root.iterdir() if path.suffix in (".tmp", ".deleted")]
        step += 2
    return stood


def operations(team: Team, folder: Path, step: int) -> list[str]:
    """The file operations of rank 0's process in one save."""
    (folder / "trace").touch()
    team.save(step, random_state(step))
    lines = (folder / "trace").read_text().splitlines()
    (folder / "trace").unlink()
    begun = next(line for line in lines if line.startswith(f"os.mkdir {team.root}/step-{step:08d}."))
    return lines[lines.index(begun) :]


def points_of_commit(trace: list[str], root: Path, step: int) -> dict[str, int]:
    """Operations around the manifest, the rename and the removal of the step before."""
    tmp, old = trace[0].removeprefix("os.mkdir "), f"{root}/step-{step - 1:08d}"
    renamed = trace.index(f"os.rename {tmp}")
    return {
        "before the manifest": trace.index(f"open {tmp}/manifest.json"),
        "after the manifest": trace.index(f"open {tmp}/manifest.json") + 1,
        "before the rename": renamed,
        "after the rename": renamed + 1,
        "before the removal of the old step": trace.index(f"os.rename {old}"),
        "amid it": trace.index(f"shutil.rmtree {old}.deleted") + 30,
    }


def test_killed_around_the_commit(folder: Path) -> None:
    with Team(Layout(1, 1), folder / "checkpoints", keep_last=1) as team:
        team.save(1, random_state(1))
        points = points_of_commit(operations(team, folder, 2), team.root, 2)
        assert kill_at(team, folder, list(points.values()), 3) == 3


def test_rank_0_killed_after_the_rename_and_every_rank_knows(folder: Path) -> None:
    with Team(Layout(1, 2), folder / "checkpoints", keep_last=1) as team:
        team.save(1, random_state(1))
        points = points_of_commit(operations(team, folder, 2), team.root, 2)
        assert kill_at(team, folder, [points["after the rename"]], 3) == 1


@pytest.mark.slow
def test_killed_at_50_points(folder: Path) -> None:
    layout = Layout(1, 1)
    assert layout.files > 100
    with Team(layout, folder / "checkpoints", keep_last=1) as team:
        team.save(1, random_state(1))
        trace = operations(team, folder, 2)
        named = points_of_commit(trace, team.root, 2)
        spread = [point * (len(trace) - 1) // (49 - len(named)) for point in range(50 - len(named))]
        points = sorted([*spread, *named.values()])
        assert len(points) == 50
        assert kill_at(team, folder, points, 3) >= 3


def wait_for_files(root: Path, step: int, count: int) -> Path:
    """Wait until a step that is being written has so many files, and return its folder."""
    deadline = time.monotonic() + 30
    while True:
        for folder in root.glob(f"step-{step:08d}.*tmp"):
            if sum(len(files) for _, _, files in os.walk(folder)) >= count:
                return folder
        assert time.monotonic() < deadline, "no save goes on"
        time.sleep(0.002)


def test_one_of_four_processes_killed_during_a_save(folder: Path) -> None:
    root = folder / "checkpoints"
    with Team(Layout(2, 2, seed=3), root) as team:
        team.save(1, random_state(1))
        for step, victim in ((2, 2), (4, 0)):
            (folder / "slow").write_text("0.01")
            team.start(step, random_state(step))
            wait_for_files(root, step, 30)
            os.kill(team.pid(victim), signal.SIGKILL)
            (folder / "slow").unlink()
            outcomes = team.wait()
            for rank, outcome in enumerate(outcomes):
                assert outcome is not None
                assert outcome.path is None
                assert outcome.error is not None
                if rank == victim:
                    assert outcome.error == KILLED.format(victim)
                else:
                    assert f"lost the saving process of rank {victim} on 127.0.0.1" in outcome.error
            assert_newest(root, step - 1, random_state(step - 1))
            assert_saves(team, step + 1)


def assert_saves(team: Team, step: int) -> None:
    for outcome in team.save(step, random_state(step)):
        assert outcome is not None
        assert outcome.error is None
    assert_newest(team.root, step, random_state(step))
    assert not list(team.root.glob("*.tmp"))


@pytest.mark.slow
def test_a_process_that_stops_answering_fails_the_save(folder: Path) -> None:
    with Team(Layout(1, 3, seed=3), folder / "checkpoints", timeout=2) as team:
        team.save(1, random_state(1))
        os.kill(team.pid(1), signal.SIGSTOP)
        team.start(2, random_state(2))
        with ThreadPoolExecutor() as threads:
            waiting = [threads.submit(saver.wait) for saver in team.savers]
            outcomes = [waiting[rank].result(20) for rank in (0, 2, 1)]
        assert_failed(outcomes[:2], "the saving process of rank 1 on 127.0.0.1 did not connect")
        assert_failed(outcomes[2:], "the saving process of rank 1 on 127.0.0.1 gave no sign of life for")
        assert_newest(team.root, 1, random_state(1))
        assert_saves(team, 3)


def test_a_process_that_cannot_be_started_again_fails_the_save_on_every_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Team(Layout(1, 2), folder / "checkpoints") as team:
        team.save(1, random_state(1))
        process = team.savers[1]._process
        assert process is not None
        process.kill()
        process.wait()
        with monkeypatch.context() as patch:
            patch.setattr(saver_module, "PROGRAM", "raise SystemExit(3)")
            outcomes = team.save(2, random_state(2))
        error = "the saving process of rank 1 on 127.0.0.1 ended with exit code 3"
        assert [outcome and outcome.error for outcome in outcomes] == [error] * 2
        assert_saves(team, 3)


def assert_failed(outcomes: list[Outcome | None], *words: str) -> None:
    """The same on every rank."""
    errors = {outcome.error for outcome in outcomes if outcome is not None}
    assert len(outcomes) == sum(outcome is not None and outcome.path is None for outcome in outcomes)
    assert len(errors) == 1, errors
    (error,) = errors
    assert error is not None
    for word in words:
        assert word in error


def test_a_folder_that_vanishes_and_comes_back(folder: Path) -> None:
    run = folder / "checkpoints" / "run"  # operations in this folder can be slowed down
    run.mkdir(parents=True)
    root, away = run / "checkpoints", folder / "away"
    with Team(Layout(1, 2), root) as team:
        team.save(1, random_state(1))
        os.rename(run, away)
        assert_failed(team.save(2, random_state(2)), str(root), "No such file or directory")
        os.rename(away, run)
        assert_newest(root, 1, random_state(1))
        assert_saves(team, 3)
        (folder / "slow").write_text("0.01")
        team.start(4, random_state(4))
        begun = wait_for_files(root, 4, 30)
        shutil.rmtree(begun, ignore_errors=True)
        (folder / "slow").unlink()
        assert_failed(team.wait(), str(begun))
        assert_newest(root, 3, random_state(3))
        assert_saves(team, 5)


@pytest.mark.slow
def test_a_file_system_that_hangs(folder: Path) -> None:
    with Team(Layout(1, 2), folder / "checkpoints", timeout=2) as team:
        team.save(1, random_state(1))
        processes = [team.pid(rank) for rank in range(2)]
        (folder / "slow").write_text("60")  # rank 0's process does not even create the step's folder
        begun = time.monotonic()
        outcomes = team.save(2, random_state(2))
        assert time.monotonic() - begun < 15
        (folder / "slow").unlink()
        assert_failed(outcomes, "no answer from the saving process of rank 0 on 127.0.0.1 within 2 s")
        assert_newest(team.root, 1, random_state(1))
        assert_saves(team, 3)
        assert team.pid(0) != processes[0]  # the first one still sleeps
        assert team.pid(1) == processes[1]


def own_file(layout: Layout, rank: int) -> str:
    """The file of a chunk that a rank writes."""
    chunk = next(chunk for chunk in layout.plans[rank].chunks if chunk.owner == rank)
    return ArraySpec(kind=MODEL, tensor=chunk.tensor, dtype=layout.dtype, chunks=chunk.chunks).file(chunk.index)


@pytest.mark.parametrize(
    "what",
    ["a chunk of rank 0", "an array's metadata", "a chunk of rank 1"],
)
@pytest.mark.slow
def test_a_write_that_hangs(folder: Path, what: str) -> None:
    layout = Layout(1, 2)
    (writer,) = {chunk.owner for chunk in layout.plans[0].chunks if chunk.tensor.name == "norm"}  # of the whole tensor
    files = {f"a chunk of rank {rank}": (rank, own_file(layout, rank)) for rank in (0, 1)}
    rank, file = (files | {"an array's metadata": (writer, "model.norm/zarr.json")})[what]
    with Team(layout, folder / "checkpoints", timeout=2) as team:
        team.save(1, random_state(1))
        process = team.pid(rank)
        (folder / "slow").write_text(f"60 {file}")
        begun = time.monotonic()
        outcomes = team.save(2, random_state(2))
        # 2 s for the write, 2 s until the process is abandoned, and 2 s for the removal of the folder
        assert time.monotonic() - begun < 15
        (folder / "slow").unlink()
        assert_failed(outcomes, f"rank {rank} on 127.0.0.1: {team.root}", "a write has not ended within 2 s")
        assert_newest(team.root, 1, random_state(1))
        assert_saves(team, 3)
        assert team.pid(rank) != process  # the first one is still in the call


def test_a_failed_save_stops_writing(folder: Path) -> None:
    layout = Layout(1, 2)
    with Team(layout, folder / "checkpoints") as team:
        team.save(1, random_state(1))
        process = team.pid(0)
        # Seconds per chunk. Rank 0 has more than 40, by 4 at a time: more than 10 s of writing.
        (folder / "slow").write_text("1 /c.")
        assert sum(chunk.owner == 0 for chunk in layout.plans[0].chunks) * 3 > 40
        team.start(2, random_state(2))
        wait_for_files(team.root, 2, 10)
        os.kill(team.pid(1), signal.SIGKILL)
        begun = time.monotonic()
        outcome = team.savers[0].wait()
        assert time.monotonic() - begun < 5  # the writes in progress, of 1 s, and leeway for a slow machine
        (folder / "slow").unlink()
        team.savers[1].wait()
        assert outcome is not None
        assert outcome.error is not None
        assert "lost the saving process of rank 1 on 127.0.0.1" in outcome.error
        assert_saves(team, 3)
        assert team.pid(0) == process


@pytest.mark.slow
def test_a_save_may_take_longer_than_the_timeout(folder: Path) -> None:
    layout = Layout(1, 2)
    with Team(layout, folder / "checkpoints", timeout=2) as team:
        rounds = min(sum(chunk.owner == rank for chunk in layout.plans[rank].chunks) for rank in range(2)) * 3 // 4
        (folder / "slow").write_text(f"{6.5 / rounds} /c.")  # of chunks, each rank's 4 at a time
        (outcome, _) = team.save(1, random_state(1))
        assert outcome is not None
        assert outcome.error is None
        assert outcome.seconds > 6
        assert_newest(team.root, 1, random_state(1))
        # A process that is stopped during a save, while its rank does not poll.
        team.start(2, random_state(2))
        wait_for_files(team.root, 2, 10)
        os.kill(team.pid(1), signal.SIGSTOP)
        with ThreadPoolExecutor() as threads:
            outcome = threads.submit(team.savers[0].wait).result(20)
        (folder / "slow").unlink()
        assert_failed([outcome], "no sign of life from the saving process of rank 1 on 127.0.0.1 for 2 s")
        assert_failed([team.savers[1].wait()], "the saving process of rank 1 on 127.0.0.1 gave no sign of life for 2 s")
        assert_saves(team, 3)


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir()
    answer = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if answer.returncode != 0:
        pytest.skip(f"needs to mount file systems: {answer.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_full_disk(folder: Path) -> None:
    disk = folder / "disk"
    # A checkpoint takes about 200 pages of 4 KiB: one fits, two do not.
    with mounted(disk, "-t", "tmpfs", "-o", "size=1200k", "tmpfs"), Team(Layout(1, 2), disk / "checkpoints") as team:
        team.save(1, random_state(1))
        for step in (2, 3):
            assert_failed(team.save(step, random_state(step)), f"step-0000000{step}.", "No space left on device")
            assert [path.name for path in team.root.iterdir()] == ["step-00000001"]  # the failed save leaves no files
            assert_newest(team.root, 1, random_state(1))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert_saves(team, 4)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_read_only_folder(folder: Path) -> None:
    disk = folder / "disk"
    with mounted(disk, "-t", "tmpfs", "tmpfs"), Team(Layout(1, 2), disk / "checkpoints") as team:
        team.save(1, random_state(1))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert_failed(team.save(2, random_state(2)), str(disk / "checkpoints"), "Read-only file system")
        assert_newest(team.root, 1, random_state(1))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert_saves(team, 3)

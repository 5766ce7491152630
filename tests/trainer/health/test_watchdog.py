"""Hangs: the run ends by itself, names the rank that lags, and resumes from its last checkpoint."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch.distributed import DistNetworkError, HashStore

from griffin.launch.local import run_local
from griffin.parallel.config import ParallelConfig
from griffin.parallel.stage import Stage
from griffin.parallel.world.grid import Grid, rank_grid
from griffin.parallel.world.messages import pack, seal, unpack
from griffin.parallel.world.ranks import HUNG, Ranks
from griffin.tools.commands.train import PRELOAD, train_rank
from griffin.trainer import loop
from griffin.trainer.checkpoint.checkpoints import Checkpoints
from griffin.trainer.checkpoint.manifest import verify
from griffin.trainer.health.hang_report import SilentRank, compose_report, lagging_ranks
from griffin.trainer.health.rank_state import Collective, RankState
from griffin.trainer.health.watchdog import Alarm, Watchdog
from griffin.trainer.reporting.report import Report
from griffin.trainer.run.attempts import read_end
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training
from tests.ranks import RankPool
from tests.small_runs import PATIENCE, Watch, launch, metrics, run, saved_files, series, wait_until_saved, write_config

HANG = 4.0  # seconds; a step takes some hundredths
BOUND = 15.0  # from then to the end of all ranks
SAVED = 4  # the step before that of the hang has been saved


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("hangs"))


def config(path: Path, *overrides: str) -> Config:
    hang = ["--health.hang_seconds", str(HANG), "--checkpoint.interval", str(SAVED), "--log.interval", "1"]
    return load_config(path, [*hang, "--train.eval_interval", "0", "--log.tensorboard", "false", *overrides])


def after_the_save(run_dir: Path, mark: Path, do: Any) -> None:
    """Call `do` after the last save, so that each test resumes from the same step. `mark` keeps the time."""
    wait_until_saved(run_dir, SAVED)
    mark.touch()
    do()


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fall_asleep() -> None:
    time.sleep(600)


def hang(config: Config, run_dir: Path, world_size: int, rank: int, do: Any) -> str:
    """Run with a rank that hangs, and return the report, which must come within the time limit."""
    mark = run_dir.with_suffix(".mark")
    watch = Watch(at_step={(rank, SAVED + 2): partial(after_the_save, run_dir, mark, do)})
    assert launch(world_size, config, run_dir, watch) == HUNG
    seconds = time.time() - mark.stat().st_mtime
    # Another rank may have entered the step, from which its limit counts, a moment earlier.
    assert HANG - 0.5 <= seconds < HANG + BOUND
    (folder,) = (run_dir / "hangs").iterdir()
    assert folder.name == f"step-{SAVED + 2:08}-attempt-1"
    assert_hung(run_dir)
    report = (folder / "report.txt").read_text()
    print(f"{seconds:.1f} s\n{report}")  # for those who run it with -s
    return report


def assert_hung(run_dir: Path) -> None:
    end = read_end(RunFolder(run_dir))
    assert end is not None
    assert (end.why, end.exit_code, end.step) == ("hung", HUNG, SAVED + 1)
    assert (run_dir / "attempts.jsonl").read_text().count("hung") == 1


def lagging(report: str) -> list[int]:
    named = report.partition("Ranks that lag:\n")[2].partition("\n\n")[0]
    return [int(number) for number in re.findall(r"^  rank (\d+) on", named, re.MULTILINE)]


@pytest.fixture(scope="module")
def stopped(config_path: Path) -> tuple[Path, str]:
    run_dir = config_path.parent / "stopped"
    return run_dir, hang(config(config_path, "--parallel.tensor", "2"), run_dir, 4, 2, stop_this_process)


def test_a_stopped_rank_is_named(stopped: tuple[Path, str]) -> None:
    run_dir, report = stopped
    assert lagging(report) == [2]
    assert f"rank 2 on {socket.gethostname()}" in report
    assert re.search(r"rank 2 on .*no sign of life for [0-9]+ s .*; last heard in ", report, re.MULTILINE)
    assert "Ranks that lag:\n  rank 2 on" in (run_dir / "console.log").read_text()


def test_every_other_rank_leaves_its_stacks(stopped: tuple[Path, str]) -> None:
    run_dir, _ = stopped
    files = {path.name: path.read_text() for path in (run_dir / "hangs").glob("*/rank-*.txt")}
    assert sorted(files) == ["rank-00000.txt", "rank-00001.txt", "rank-00003.txt"]
    for text in files.values():
        assert "in step 6" in text
        assert "Communication: " in text
        assert "NOT ENDED" in text
        assert re.search(r"Current thread|Thread 0x", text)
        assert "distributed_c10d.py" in text


@pytest.mark.slow
def test_hung_run_resumes_from_its_last_checkpoint(
    stopped: tuple[Path, str], config_path: Path, rank_pool: RankPool
) -> None:
    run_dir, _ = stopped
    settings = config(config_path, "--parallel.tensor", "2")
    begun = time.monotonic()
    assert launch(4, settings, run_dir) == 0
    assert time.monotonic() - begun < PATIENCE  # the lock of the hung run is taken over at once
    text = (run_dir / "console.log").read_text()
    assert f"Weights: step {SAVED} of {run_dir} (the run's own folder)" in text
    other = config_path.parent / "undisturbed"
    rank_pool.run(run, 4, settings, other)
    assert series(run_dir, "loss") == series(other, "loss")
    assert saved_files(run_dir, settings.train.steps) == saved_files(other, settings.train.steps)
    verify(run_dir / "checkpoints" / f"step-{settings.train.steps:08}")
    assert {line["attempt"] for line in metrics(run_dir)} == {1, 2}


@pytest.mark.slow
def test_a_rank_that_sleeps_elsewhere_is_named(config_path: Path, tmp_path: Path) -> None:
    report = hang(config(config_path), tmp_path / "run", 2, 1, fall_asleep)
    assert lagging(report) == [1]
    assert "fall_asleep (" in report
    assert "it has not entered" in report
    assert (tmp_path / "run/hangs/step-00000006-attempt-1/rank-00001.txt").exists()


@pytest.mark.slow
def test_the_first_rank_is_named_too(config_path: Path, tmp_path: Path) -> None:
    assert lagging(hang(config(config_path), tmp_path / "run", 2, 0, stop_this_process)) == [0]


@pytest.mark.slow
def test_a_rank_that_stops_while_it_saves_is_noticed_by_its_neighbour(config_path: Path, tmp_path: Path) -> None:
    """Saving has no time limit: only heartbeats stop."""
    save = Watch(at_save={SAVED: _stop_in_save})
    assert launch(3, config(config_path, "--train.global_batch", "6"), tmp_path / "run", save) == HUNG
    (report,) = (tmp_path / "run/hangs").glob("*/report.txt")
    assert "HANG: rank 0 has sent no sign of life" in report.read_text()
    assert lagging(report.read_text()) == [0]


def _stop_in_save(saver: Any) -> None:
    stop_this_process()


@pytest.mark.slow
def test_ranks_exit_if_the_disk_cannot_be_written(config_path: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    watch = Watch(at_step={(1, SAVED + 2): partial(_without_hangs_folder, run_dir)})
    assert launch(2, config(config_path), run_dir, watch) == HUNG
    assert (run_dir / "hangs").is_file()
    assert_hung(run_dir)
    assert "Ranks that lag:\n  rank 1 on" in (run_dir / "console.log").read_text()


def _without_hangs_folder(run_dir: Path) -> None:
    (run_dir / "hangs").write_text("")  # nothing can be written below it
    fall_asleep()


@pytest.mark.slow
def test_a_single_rank(config_path: Path, tmp_path: Path) -> None:
    assert "fall_asleep (" in hang(config(config_path), tmp_path / "run", 1, 0, fall_asleep)


@pytest.mark.slow
def test_process_that_runs_no_python_ends() -> None:
    """The interpreter's lock is held forever: C code writes the stack to stderr, and the exit code is 1."""
    script = (
        "import ctypes, sys, time; from griffin.trainer.health import watchdog\n"
        "watchdog.LAST_SECONDS = 0.5\n"
        "dog = object.__new__(watchdog.Watchdog); dog._hang_seconds, dog._kinds = 0.5, {'step'}\n"
        "dog._phase = watchdog._Phase(entered=0, name='', step=0, since=0, limit=float('inf'))\n"
        "with dog.watching('step', 1): ctypes.PyDLL(None).sleep(600)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    assert "Timeout (0:00:01)!" in ended.stderr
    assert 'File "<string>", line 5' in ended.stderr


@pytest.mark.slow
def test_a_stopped_server_of_the_store(config_path: Path, tmp_path: Path) -> None:
    """Rank 0 serves the store, as under srun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_dir = tmp_path / "run"
    overrides = ["--health.hang_seconds", str(HANG), "--train.steps", "100000", "--train.eval_interval", "0"]
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-P",
            "-m",
            "griffin.tools.cli",
            "train",
            str(config_path),
            "--run-dir",
            str(run_dir),
        ]
        log = (tmp_path / f"rank-{rank}.log").open("w")
        processes.append(subprocess.Popen([*command, *overrides], env=environment, stdout=log, stderr=log))
        log.close()
    try:
        deadline = time.monotonic() + 2 * PATIENCE
        while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 4:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        os.kill(processes[0].pid, signal.SIGSTOP)
        begun = time.monotonic()
        assert processes[1].wait(PATIENCE) == HUNG
        assert time.monotonic() - begun < HANG + BOUND
    finally:
        for process in processes:
            process.kill()
            process.wait()
    (report,) = (run_dir / "hangs").glob("*/report.txt")
    assert f"that rank 0 serves at 127.0.0.1:{port} does not answer" in report.read_text()
    assert "distributed_c10d.py" in (report.parent / "rank-00001.txt").read_text()
    assert "does not answer" in (tmp_path / "rank-1.log").read_text()


def _slow_run(ranks: Ranks, config: Config, run_dir: Path) -> None:
    """What may take long takes 1.5 times the limit: the index, the first step, each evaluation (in short pieces), a
    save, and what rank 0 writes last."""
    originals: dict[str, Any] = {
        "build_index": loop.build_index,
        "step": Training.step,
        "save": Checkpoints.save,
        "end": Report.end,
    }
    long = 1.5 * config.health.hang_seconds

    def after(name: str, wanted: Any = lambda *_: True) -> Any:
        def slowly(*args: Any, **kwargs: Any) -> Any:
            if wanted(*args):
                time.sleep(long)
            return originals[name](*args, **kwargs)

        return slowly

    get = Stage.forward

    def forward(stage: Stage, *args: Any) -> Any:
        if not stage.training:
            time.sleep(long / 4)  # of 8 micro-batches
        return get(stage, *args)

    with (
        mock.patch.object(loop, "build_index", after("build_index")),
        mock.patch.object(Training, "step", after("step", lambda training, *_: training.steps_done == 0)),
        mock.patch.object(Stage, "forward", forward),
        mock.patch.object(Checkpoints, "save", after("save")),
        mock.patch.object(Report, "end", after("end")),
    ):
        train_rank(ranks, config, run_dir, None)


@pytest.mark.slow
def test_slow_but_healthy_work_is_no_hang(config_path: Path, tmp_path: Path) -> None:
    settings = config(config_path, "--train.steps", "4", "--train.eval_interval", "4", "--checkpoint.interval", "2")
    settings = replace(settings, health=replace(settings.health, hang_seconds=2.0))
    begun = time.monotonic()
    assert run_local(_slow_run, 2, (settings, tmp_path / "run"), preload=PRELOAD) == 0
    assert time.monotonic() - begun > 5 * settings.health.hang_seconds
    assert not (tmp_path / "run/hangs").exists()
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]


def state(rank: int, *, entered: int = 7, communication: str = "all_reduce", **changes: Any) -> RankState:
    fields: dict[str, Any] = {
        "rank": rank,
        "host": f"n{rank // 2}",
        "pid": 100 + rank,
        "phase": f"step {entered}",
        "seconds": 600.0,
        "where": "wait (x.py:1)",
        "collectives": (),
    }
    return RankState(**fields | changes, entered=entered, communication=communication)


def collective(group: str, sequence: int, *, pending: bool) -> Collective:
    return Collective(group=group, purpose=f"G{group}", operation="all_reduce", sequence=sequence, pending=pending)


@pytest.mark.parametrize(
    "forged", [b"x", b'{"rank": 1, "step": "/../.."}', seal(b"another", "griffin/watchdog/1/alarm", 1)]
)
def test_alarms_from_outside_the_run_are_ignored(tmp_path: Path, forged: bytes) -> None:
    store = HashStore()
    name = "griffin/watchdog/1/alarm"
    store.set(name, forged)  # type: ignore[arg-type]  # it takes bytes as well
    places = [
        Ranks(rank=rank, world_size=2, local_rank=0, address="", port=0, source="", store_served=True)
        for rank in (0, 1)
    ]
    folder = SimpleNamespace(attempt=1, hangs=tmp_path, console=tmp_path / "console.log")
    grid = cast(Grid, SimpleNamespace(device=torch.device("cpu"), key=b"k" * 32))
    watchdogs = [Watchdog(4.0, place, grid, cast(RunFolder, folder)) for place in places]

    def talk(watchdog: Watchdog) -> str | None:
        with mock.patch.object(watchdog._closing, "wait", side_effect=[False, True]):
            watchdog._exchange_heartbeats(cast(Any, store))
        return watchdog._alarm

    assert [talk(watchdog) for watchdog in watchdogs] == [None, None]
    raised = [watchdog._raise(cast(Any, store), Alarm(rank=n, step=7 + n)) for n, watchdog in enumerate(watchdogs)]
    assert raised == [Alarm(rank=0, step=7)] * 2
    assert [talk(watchdog) for watchdog in watchdogs] == ["another rank has raised the alarm"] * 2


class Unsteady:
    """A connection to the store that is lost after some requests."""

    def __init__(self, store: Any) -> None:
        self._store, self._left = store, 5

    def __getattr__(self, name: str) -> Any:
        self._left -= 1
        if self._left < 0:
            raise DistNetworkError("Broken pipe")
        return getattr(self._store, name)


def watched_over_lost_connections(ranks: Ranks, run_dir: Path) -> int:
    """The number of connections of a rank that works for four times as long as it may be silent."""
    made: list[Unsteady] = []
    folder = SimpleNamespace(attempt=1, hangs=run_dir / "hangs", console=run_dir / "console.log")
    with rank_grid(ParallelConfig(), ranks) as grid:
        watchdog = Watchdog(1.0, ranks, grid, cast(RunFolder, folder))
        if ranks.rank == 1:
            connect = watchdog._connect

            def connect_unsteadily() -> Any:
                made.append(Unsteady(connect()))
                return made[-1]

            watchdog._connect = connect_unsteadily  # type: ignore[method-assign]
        with watchdog:
            time.sleep(4)
    return len(made)


@pytest.mark.slow
def test_watchdog_reconnects_after_a_lost_connection(rank_pool: RankPool, tmp_path: Path) -> None:
    steady, made = rank_pool.run(watched_over_lost_connections, 2, tmp_path)
    assert steady == 0
    assert made > 2
    assert not (tmp_path / "hangs").exists()


def test_lagging_ranks() -> None:
    def named(*states: RankState, silent: tuple[SilentRank, ...] = ()) -> list[str]:
        return [line.split(" on ")[0] for line in lagging_ranks({state.rank: state for state in states}, silent)]

    assert named(*map(state, range(4))) == []
    assert named(state(0), state(1), silent=(SilentRank(rank=2, last=state(2)),)) == ["rank 2"]
    assert named(state(0), state(1, entered=6), state(2)) == ["rank 1"]
    assert named(state(0), state(1), state(2, communication="")) == ["rank 2"]
    # 0 and 1 share group a, 1 and 2 group b: 0 waits for 1, which waits for 2.
    assert named(
        state(0, collectives=(collective("a", 5, pending=True),)),
        state(1, collectives=(collective("a", 4, pending=False), collective("b", 9, pending=True))),
        state(2, collectives=(collective("b", 8, pending=False),)),
    ) == ["rank 2"]
    # 0 and 1 have entered their collectives in different orders.
    assert named(
        state(0, collectives=(collective("a", 5, pending=True), collective("b", 8, pending=False))),
        state(1, collectives=(collective("a", 4, pending=False), collective("b", 9, pending=True))),
    ) == ["rank 0", "rank 1"]
    # All in the same collective: nobody is behind.
    assert named(*(state(rank, collectives=(collective("a", 5, pending=True),)) for rank in range(3))) == []


def test_a_report_of_a_thousand_ranks_can_be_read() -> None:
    states = {rank: state(rank) for rank in range(1024) if rank != 77}
    states[5] = unpack(pack(state(5, collectives=(collective("a", 1, pending=True),))), RankState)
    head, report = compose_report(states, [SilentRank(rank=77)], reason="step 7 has taken more than 600 s on rank 3")
    assert head.splitlines() == [
        "HANG: step 7 has taken more than 600 s on rank 3",
        "Ranks that lag:",
        "  rank 77: has never sent a sign of life",
    ]
    assert "  ranks 0-76, 78-1023: step 7, all_reduce, wait (x.py:1)\n" in report
    assert "  all_reduce number 1 of Ga: rank 5\n" in report
    head, report = compose_report(states, map(silent_rank, range(900, 1000)), reason="")
    assert len(head.splitlines()) == 19
    assert head.endswith("  and 84 more ranks, in the report")
    assert all(f"  rank {rank}: has never sent a sign of life\n" in report for rank in range(900, 1000))


def silent_rank(rank: int) -> SilentRank:
    return SilentRank(rank=rank)

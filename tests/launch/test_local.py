from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from griffin.parallel.world.ranks import HUNG, STOPPED

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(Path(__file__).with_name("local_scenarios.py"))]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)
PROMPT = 10.0  # seconds: ranks that hang do so for 600, and a graceful end was allowed 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    subprocess.run([*COMMAND, str(folder)], env=ENVIRONMENT, check=True, timeout=100)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, before it is read
        return False


def wait_until_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + PROMPT
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "processes were left"
        time.sleep(0.02)


def test_ranks_meet_in_the_store_and_share_the_cores(folder: Path, results: dict[str, Any]) -> None:
    assert results["meet"]["code"] == 0
    assert results["meet"]["stderr"] == ""
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    for rank in range(3):
        heard = json.loads((folder / f"meet/heard-{rank}").read_text())
        assert heard == ["0", "1", "2", "local", threads, str(folder)]  # the last: the command line is the parent's


def test_failing_rank_ends_the_others_at_once(results: dict[str, Any]) -> None:
    result = results["raise"]
    assert result["code"] == 1
    assert result["seconds"] < PROMPT
    assert result["stderr"].startswith("griffin: rank 1 of 3 failed (exit code 1)\nTraceback")
    assert result["stderr"].endswith("RuntimeError: the oven is cold\n")


def test_a_crash_is_reported_instead_of_its_consequences(results: dict[str, Any]) -> None:
    result = results["crash"]
    assert result["code"] == 128 + signal.SIGKILL
    assert result["seconds"] < PROMPT
    assert result["stderr"] == "griffin: rank 2 of 3 failed (killed by SIGKILL)\n"


def test_exit_code_of_a_rank_is_kept(results: dict[str, Any]) -> None:
    assert results["exit"]["code"] == 7
    assert results["exit_0"]["code"] == 0


def test_a_stopped_rank_is_killed_where_another_leaves_with_the_code_of_a_hang(
    folder: Path, results: dict[str, Any]
) -> None:
    result = results["hung"]
    assert result["code"] == HUNG
    assert result["seconds"] < PROMPT
    assert result["stderr"] == f"griffin: the ranks hung (exit code {HUNG})\n"
    wait_until_ended([int((folder / f"hung/pid-{rank}").read_text()) for rank in range(3)])


@pytest.mark.parametrize(("name", "number"), [("term", signal.SIGTERM), ("interrupt", signal.SIGINT)])
def test_stop_signal_reaches_the_ranks(results: dict[str, Any], name: str, number: signal.Signals) -> None:
    assert results[name]["code"] == 128 + number
    assert results[name]["seconds"] < PROMPT
    assert results[name]["stderr"] == f"griffin: stopped by {number.name}\n"


def test_usr1_reaches_the_ranks_and_stops_nothing(folder: Path, results: dict[str, Any]) -> None:
    assert results["usr1"]["code"] == 0
    for rank in range(2):
        assert (folder / f"usr1/saved-{rank}").read_text() == str(int(signal.SIGUSR1))


def test_ranks_that_save_when_stopped_are_waited_for(folder: Path, results: dict[str, Any]) -> None:
    for name in ("save", "save_usr1"):
        assert results[name]["code"] == STOPPED
        assert results[name]["stderr"] == ""
        assert (folder / name / "saved-1").exists()


def test_a_failure_while_others_save_is_one(results: dict[str, Any]) -> None:
    """The rank that waits for the failed one gets the grace time of a stop, not the time for saving."""
    result = results["save_or_fail"]
    assert result["code"] == 1
    assert 1.5 <= result["seconds"] < PROMPT
    assert result["stderr"].startswith("griffin: rank 1 of 3 failed (exit code 1)\nTraceback")
    assert result["stderr"].endswith("RuntimeError: the disk is full\n")


@pytest.mark.parametrize(("name", "number"), [("grace", signal.SIGINT), ("save_late", signal.SIGTERM)])
def test_ranks_that_ignore_a_stop_are_killed_after_its_time(
    results: dict[str, Any], name: str, number: signal.Signals
) -> None:
    assert results[name]["code"] == 128 + number
    assert 1.0 <= results[name]["seconds"] < PROMPT
    assert results[name]["stderr"] == f"griffin: ranks had not ended 1 s after {number.name}: killed\n"


@pytest.mark.parametrize(
    ("name", "number"), [("int_int", signal.SIGINT), ("term_term", signal.SIGTERM), ("term_int", signal.SIGINT)]
)
def test_second_stop_kills_at_once(results: dict[str, Any], name: str, number: signal.Signals) -> None:
    assert results[name]["code"] == 128 + number
    assert results[name]["seconds"] < PROMPT
    assert results[name]["stderr"] == f"griffin: ranks had not ended before a second signal, {number.name}: killed\n"


def test_arguments_that_do_not_pickle_are_an_error(results: dict[str, Any]) -> None:
    assert "pickle" in results["pickle"]["code"]


def test_signal_handlers_are_restored(results: dict[str, Any]) -> None:
    assert all(result["handlers_restored"] for result in results.values())


def test_no_process_outlives_its_run(folder: Path) -> None:
    texts = [path.read_text() for path in folder.glob("*/ready-*")]
    pids = [int(text) for text in texts if text]  # one may have been killed before it wrote
    children = [int(path.read_text()) for path in folder.glob("child/child-*")]
    assert len(pids) > 20
    assert len(children) == 2
    wait_until_ended(pids + children)  # a killed child of a rank still has to be reaped by init


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([*COMMAND, str(tmp_path), "hang"], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert time.monotonic() < deadline
            assert parent.poll() is None
            time.sleep(0.05)
        pids = [int(path.read_text()) for path in tmp_path.glob("ready-*") if path.read_text()]
        assert all(is_running(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
    wait_until_ended(pids)

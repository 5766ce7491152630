"""The lock of a run folder, between real processes: one owner at a time, whoever dies and whoever hurries."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import griffin.trainer.run.lock as lock_module
from griffin.trainer.run.lock import Owner, RunLock, holds, refuse_if_held

ROOT = Path(__file__).parents[3]
PROMPT = 5.0  # seconds; patience with other machines is 60
OWNER = """
import sys, time
from pathlib import Path
from griffin.trainer.run.lock import RunLock
lock = RunLock.acquire(Path(sys.argv[1]))
print(lock.token, flush=True)
time.sleep(600)
"""
# Each newcomer says that it is ready and waits for a line; the winner holds the lock until the next one.
NEWCOMER = """
import sys
from pathlib import Path
from griffin.trainer.run.lock import RunLock
print("ready", flush=True)
for line in sys.stdin:
    try:
        lock = RunLock.acquire(Path(line.strip()), say=lambda text: None)
    except ValueError as error:
        print("refused", error, flush=True)
        sys.stdin.readline()
    else:
        print("owner", lock.token, flush=True)
        sys.stdin.readline()
        lock.release()
    print("ready", flush=True)
"""


def start(code: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_line(process: subprocess.Popen[str], line: object) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of tmp_path."""
    process = start(OWNER, tmp_path)
    assert len(read_line(process)) == 32
    yield process
    end(process)


def write_lock(path: Path, **changes: Any) -> Owner:
    """A lock file as this process would write it, with `changes`."""
    owner = dataclasses.replace(Owner.current(), **changes)
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    return owner


@contextmanager
def touched(path: Path, first: float) -> Iterator[None]:
    """Touch `path` repeatedly, with the modification time `first` and later ones."""
    over = threading.Event()

    def touch() -> None:
        beat = first
        while not over.wait(0.3):
            beat += 1
            os.utime(path, (beat, beat))

    os.utime(path, (first, first))
    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_lock_names_its_owner_and_is_removed(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "new"
    with RunLock.acquire(run_dir) as lock:
        assert lock.path == run_dir / "lock"
        written = json.loads(lock.path.read_text())
        assert written["token"] == lock.token
        assert written["pid"] == os.getpid()
        assert written["process_started"] > 0
        assert written["host"] == os.uname().nodename
        assert holds(lock.path, lock.token)
        assert not holds(lock.path, "0" * 32)
    assert list(run_dir.iterdir()) == []
    assert not holds(lock.path, lock.token)
    lock.release()  # once more does nothing


def test_running_owner_on_this_machine_is_refused_at_once(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    started = time.monotonic()
    for attempt in (RunLock.acquire, refuse_if_held):
        with pytest.raises(ValueError, match=rf"lock: another run writes .* on .* \(process {owner.pid}, since 20.*"):
            attempt(tmp_path)
    assert time.monotonic() - started < PROMPT


def test_the_lock_of_a_killed_owner_is_taken_over_at_once(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    before = (tmp_path / "lock").read_text()
    owner.kill()
    while True:  # killed, and then not waited for yet: a zombie
        state = Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
    said: list[str] = []
    refuse_if_held(tmp_path)
    started = time.monotonic()
    with RunLock.acquire(tmp_path, said.append) as lock:
        assert time.monotonic() - started < PROMPT
        assert holds(lock.path, lock.token)
        assert (tmp_path / "lock").read_text() != before
        assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    (text,) = said
    assert f"process {owner.pid}" in text
    assert text.endswith("which has ended")


@pytest.mark.parametrize(
    "left_behind",
    [
        lambda: {"pid": ended_process()},
        lambda: {"process_started": 12345},  # the id is another process's now
        lambda: {"machine": "other", "host": "other", "job": "c/7", "job_restarts": 1},
    ],
    ids=["ended", "other process of that id", "earlier start of the job"],
)
def test_stale_lock_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: Callable[[], dict[str, Any]]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write_lock(tmp_path / "lock", **left_behind())
    started = time.monotonic()
    with RunLock.acquire(tmp_path, lambda text: None) as lock:
        assert time.monotonic() - started < PROMPT
        assert json.loads(lock.path.read_text())["job"] == "c/7"
        assert json.loads(lock.path.read_text())["job_restarts"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"job": "c/7", "job_restarts": 2},  # another step of the same start
        {"job": "d/7", "job_restarts": 1},
    ],
)
def test_running_owner_on_another_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    path = tmp_path / "lock"
    write_lock(path, machine="other", host="node17", user="ada", **changes)
    before = path.read_text()
    refuse_if_held(tmp_path)  # it cannot tell without waiting
    started = time.monotonic()
    with (
        touched(path, time.time()),
        pytest.raises(ValueError, match=r"lock: another run writes this folder: ada on node17 \(process"),
    ):
        RunLock.acquire(tmp_path, lambda text: None)
    assert time.monotonic() - started < PROMPT
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["", "{", '{"token": "../../x"}', None])
def test_a_lock_without_a_sign_of_life_is_taken_over(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "lock"
    if text is None:
        write_lock(path, machine="other", host="node17")
    else:
        path.write_text(text)
    said: list[str] = []
    started = time.monotonic()
    with RunLock.acquire(tmp_path, said.append, patience=0.6) as lock:
        assert 0.6 <= time.monotonic() - started < PROMPT
        assert holds(path, lock.token)
    assert [text.partition("; ")[2] for text in said[:-1]] == ["waiting up to 0.6 s for a sign of life"]
    assert said[-1].endswith("without a sign of life for 0.6 s")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    written = threading.Timer(0.3, lambda: write_lock(path, user="ada"))
    written.start()
    with pytest.raises(ValueError, match="another run writes this folder: ada on"):
        RunLock.acquire(tmp_path, lambda text: None)
    written.join()


def test_clocks_need_not_agree(tmp_path: Path) -> None:
    """Whether a modification time changes counts, not whether it lies in the future or long ago."""
    path = tmp_path / "lock"
    for clock in (1e9, 2.5e9):
        write_lock(path, machine="other")
        with touched(path, clock), pytest.raises(ValueError, match="another run"):
            RunLock.acquire(tmp_path, lambda text: None)
        with RunLock.acquire(tmp_path, lambda text: None, patience=0.5):
            pass


def test_heartbeat(tmp_path: Path) -> None:
    with RunLock.acquire(tmp_path, heartbeat=0.05) as lock:
        os.utime(lock.path, (1e9, 1e9))
        deadline = time.monotonic() + PROMPT
        while lock.path.stat().st_mtime == 1e9:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_lost_lock_is_neither_touched_nor_removed(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path, heartbeat=0.02)
    os.replace(lock.path, tmp_path / "aside")
    other = write_lock(lock.path, machine="other")
    os.utime(lock.path, (1e9, 1e9))
    time.sleep(0.2)
    assert lock.path.stat().st_mtime == 1e9
    assert not holds(lock.path, lock.token)
    lock.release()
    assert holds(lock.path, other.token)


def test_a_vanished_folder_disturbs_nothing(tmp_path: Path) -> None:
    with RunLock.acquire(tmp_path / "run", heartbeat=0.02) as lock:
        shutil.rmtree(tmp_path / "run")
        time.sleep(0.2)  # pytest would report an exception of the thread
        assert any(thread.name == "run lock" for thread in threading.enumerate())
        assert not holds(lock.path, lock.token)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def newcomers() -> Iterator[list[subprocess.Popen[str]]]:
    processes = [start(NEWCOMER) for _ in range(4)]
    assert [read_line(process) for process in processes] == ["ready"] * 4
    yield processes
    for process in processes:
        end(process)


@pytest.mark.parametrize("state", ["free", "stale", "stale with a claim"])
def test_one_of_several_newcomers_gets_the_lock(
    tmp_path: Path, newcomers: list[subprocess.Popen[str]], state: str
) -> None:
    gone = ended_process()
    for round_number in range(10):
        run_dir = tmp_path / str(round_number)
        run_dir.mkdir()
        if state != "free":
            stale = write_lock(run_dir / "lock", pid=gone)
        if state == "stale with a claim":  # whose maker was killed before it moved it
            write_lock(run_dir / f"lock.after-{stale.token}", pid=gone)
        for process in newcomers:
            write_line(process, run_dir)
        answers = [read_line(process) for process in newcomers]
        owners = [answer.split()[1] for answer in answers if answer.startswith("owner")]
        assert len(owners) == 1, answers
        assert sum("another run writes this folder" in answer for answer in answers) == 3, answers
        assert holds(run_dir / "lock", owners[0])
        assert [file.name for file in run_dir.iterdir()] == ["lock"]
        for process in newcomers:
            write_line(process, "on")
        assert [read_line(process) for process in newcomers] == ["ready"] * 4
        assert list(run_dir.iterdir()) == []


@pytest.mark.parametrize("moment", ["_wait_for_end", "_chain"])
def test_a_late_newcomer_does_not_take_a_fresh_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A newcomer that has read a lock, or found it stale, and then sleeps while another takes it over."""
    write_lock(tmp_path / "lock", pid=ended_process())
    taken: list[RunLock] = []
    original = getattr(lock_module, moment)

    def sleep_after(*args: Any) -> Any:
        result = original(*args)
        monkeypatch.setattr(lock_module, moment, original)
        taken.append(RunLock.acquire(tmp_path, lambda text: None))
        return result

    monkeypatch.setattr(lock_module, moment, sleep_after)
    with pytest.raises(ValueError, match="another run writes this folder"):
        RunLock.acquire(tmp_path, lambda text: None)
    (lock,) = taken
    assert holds(lock.path, lock.token)
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    lock.release()


@pytest.mark.parametrize("point", ["os.replace", "Path.unlink"])
def test_a_newcomer_killed_while_taking_over_blocks_nobody(tmp_path: Path, point: str) -> None:
    stale = write_lock(tmp_path / "lock", pid=ended_process())
    write_lock(tmp_path / f"lock.after-{stale.token}", pid=ended_process())
    code = f"""
import os, signal, sys
from pathlib import Path
from griffin.trainer.run.lock import RunLock
{point} = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
RunLock.acquire(Path(sys.argv[1]))
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(tmp_path.iterdir())) > 1
    with RunLock.acquire(tmp_path, lambda text: None) as lock:
        assert holds(lock.path, lock.token)


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for stale in (False, True):
        before = []
        if stale:
            write_lock(tmp_path / "lock", pid=ended_process())
            before = ["lock"]
        with pytest.raises(OSError, match="No space left"):
            RunLock.acquire(tmp_path, lambda text: None)
        assert [file.name for file in tmp_path.iterdir()] == before


def test_locking_imports_neither_torch_nor_numpy() -> None:
    code = "import griffin.trainer.run.lock, sys; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""Worker processes of `griffin checkpoint`: failures, memory, ranks of mpiexec."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from griffin.tools.checkpoints import write
from griffin.tools.common import safetensors_files
from griffin.tools.common.workers import Workers, start_workers
from griffin.trainer.checkpoint import arrays
from griffin.trainer.checkpoint.arrays import GlobalTensor
from griffin.trainer.checkpoint.manifest import verify
from griffin.trainer.checkpoint.zarr_io import Array
from tests.checkpoints import FEW, assert_equal_arrays, make_checkpoint, read_arrays, reshard, small_chunks
from tests.small_runs import wait_for

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def chunks() -> Iterator[None]:
    with small_chunks():
        yield


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The checkpoint of a float32 training, and its arrays."""
    folder = tmp_path_factory.mktemp("float32") / "step-00000100"
    return folder, make_checkpoint(folder, tensors=FEW)


def refused(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """Return the error's single line, after checking that `folder` holds no output."""
    error = capsys.readouterr().err
    assert error.startswith("griffin: error: ")
    assert error.count("\n") == 1
    assert not list(folder.iterdir())
    return error


@pytest.mark.parametrize("flags", [[], ["--rank-files"]])
def test_a_file_that_cannot_be_written(
    float32: tuple[Path, Any], tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A system error as on a full disk: files may not grow beyond 600 bytes here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        code = reshard(float32[0], tmp_path / "out", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    error = refused(capsys, tmp_path)
    assert str(tmp_path / "out.tmp") in error
    assert "File too large" in error


@pytest.mark.parametrize("flags", [[], ["--rank-files"]])
def test_a_killed_worker_ends_all(
    float32: tuple[Path, Any],
    tmp_path: Path,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Workers.run
    killed: list[Any] = []

    def run_and_kill(self: Workers, function: Any, tasks: Any, done: Any) -> None:
        def kill(result: Any) -> None:
            done(result)
            if not killed:
                assert (tmp_path / "out.tmp").exists()
                killed.extend(self._executor._processes.values())
                killed[0].kill()
                wait_for(lambda: self._executor._broken)  # else the other might do all of the rest before

        run(self, function, tasks, kill)

    monkeypatch.setattr(Workers, "run", run_and_kill)
    monkeypatch.setattr(write, "CHUNK_BYTES", 512)  # many tasks of files per rank as well
    assert reshard(float32[0], tmp_path / "out", *flags, workers=2) == 1
    assert len(killed) == 2
    assert "a worker process was killed" in refused(capsys, tmp_path)
    assert not any(child.is_alive() for child in killed)


def test_an_interrupt_leaves_nothing(
    float32: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Workers, function: Any, tasks: Any, done: Any) -> None:
        done(function(next(iter(tasks))))
        assert (tmp_path / "out.tmp").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Workers, "run", interrupted)
    assert reshard(float32[0], tmp_path / "out") == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], ["--rank-files"]])
def test_corrupted_writes_are_detected(
    float32: tuple[Path, Any],
    tmp_path: Path,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bit flips on the way to the disk, before its checksum is computed."""
    write, write_values = Array.write, safetensors_files.write_values

    def flipped(values: np.ndarray) -> np.ndarray:
        changed = values.copy()
        changed.view(np.uint8).flat[-1] ^= 1
        return changed

    monkeypatch.setattr(Array, "write", lambda self, index, values: write(self, index, flipped(values)))
    monkeypatch.setattr(
        safetensors_files,
        "write_values",
        lambda path, values: write_values(path, [*values[:-1], (values[-1][0], flipped(values[-1][1]))]),
    )
    assert reshard(float32[0], tmp_path / "out", *flags) == 2
    assert "does not hold what was written to it" in refused(capsys, tmp_path)


BOUNDED = """
import re, sys
import griffin.tools.checkpoints.rewrite
from griffin.tools.cli import main
from griffin.trainer.checkpoint import arrays

def peak():  # not getrusage's, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

if __name__ == "__main__":
    arrays.CHUNK_BYTES = griffin.tools.checkpoints.write.CHUNK_BYTES = 2**22
    before = peak()
    assert main(sys.argv[1:]) == 0
    print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A checkpoint with one tensor of 320 MiB in chunks of 4 MiB, and its size."""
    folder = tmp_path_factory.mktemp("large") / "step-00000001"
    tensor = GlobalTensor(name="blocks.0.mlp.down.weight", shape=(10240, 8192), axis=1, atoms=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", 2**22)
        make_checkpoint(folder, tensors=[tensor], weights_only=True)
    yield folder, 4 * tensor.elements
    shutil.rmtree(folder)


@pytest.mark.slow
def test_memory_is_bounded(large: tuple[Path, int], tmp_path: Path) -> None:
    """Memory besides imports, in one process: a few chunks of 4 MiB, while the tensor has 320 MiB.

    Seen: 44 to 78 MiB; half of the tensor is allowed.
    """
    source, size = large

    def growth(*words: object) -> int:
        result = subprocess.run(
            [sys.executable, "-c", BOUNDED, "checkpoint", *map(str, words), "--workers", "1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert result.returncode == 0, result.stderr
        return int(result.stdout.splitlines()[-1])

    try:
        used = {
            "chunks": growth("reshard", source, tmp_path / "step", "--tensor", 2, "--dtype", "bf16"),
            "to ranks": growth("reshard", source, tmp_path / "ranks", "--tensor", 2, "--rank-files"),
            "from ranks": growth("reshard", tmp_path / "ranks", tmp_path / "back", "--from-ranks", "--tensor", 4),
            "diff": growth("diff", source, tmp_path / "back"),
            "average": growth("average", source, tmp_path / "back", tmp_path / "mean"),
        }
    finally:
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
    assert max(used.values()) < size / 2


ORPHANS = """
import multiprocessing, time
from griffin.tools.checkpoints import rank_files
from griffin.tools.common.workers import start_workers

def tasks():
    yield 60
    yield 60
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    yield 60

if __name__ == "__main__":
    with start_workers(2) as workers:
        workers.run(time.sleep, tasks(), print)
"""


def test_workers_end_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        assert all(is_running(pid) for pid in workers)
    finally:
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process runs; a killed orphan may remain as a zombie until its new parent reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_tasks_under_way_are_bounded_and_end_before_a_failure_is_raised() -> None:
    given: list[int] = []
    ended: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(20):
            given.append(number)
            assert len(given) - len(ended) <= 2 * 2 + 1  # two for each worker, and this one
            yield number

    with start_workers(2) as workers:
        assert workers is not None
        workers.run(abs, tasks(), ended.append)
        assert sorted(ended) == list(range(20))
        begun = time.monotonic()
        with pytest.raises(ValueError, match="sleep length must be non-negative"):
            workers.run(time.sleep, [1.0, -1.0, 0.0], lambda result: None)
        assert time.monotonic() - begun >= 1.0


def mpiexec(ranks: int, *words: object) -> subprocess.CompletedProcess:
    """Run `griffin checkpoint ...` under a real mpiexec."""
    command = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if command is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("no mpiexec or no mpi4py")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    flags = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version or "OpenRTE" in version else []
    griffin = [sys.executable, "-m", "griffin.tools.cli", "checkpoint", *map(str, words)]
    return subprocess.run(
        [command, *flags, "-n", str(ranks), *griffin], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


def test_ranks_of_mpiexec_share_the_work(float32: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    result = mpiexec(3, "reshard", float32[0], tmp_path / "out", "--tensor", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("compared with the source") == 1
    verify(tmp_path / "out")
    assert_equal_arrays(read_arrays(tmp_path / "out"), float32[1])


def test_failures_under_mpiexec(float32: tuple[Path, Any], tmp_path: Path) -> None:
    source = Path(shutil.copytree(float32[0], tmp_path / "source"))
    path = source / "model.embedding.weight/c.2.0"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    (tmp_path / "out").mkdir()
    result = mpiexec(2, "reshard", source, tmp_path / "out/step", "--rank-files")
    assert result.returncode != 0
    assert result.stderr.count("griffin: error: ") == 1
    assert str(path) in result.stderr
    assert not list((tmp_path / "out").iterdir())

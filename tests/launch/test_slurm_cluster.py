"""Jobs of `griffin launch slurm` on a real SLURM cluster of two nodes: they train, and recover from failures."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import PATIENCE, Cluster, running_cluster, why_not
from tests.small_runs import metrics, saved_files, saved_steps, series, wait_for, write_config

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

LAYOUT = ["--parallel.tensor=2", "--train.micro_batch=4"]  # data 2 on four ranks


# Jobs of several processes on each of two nodes of this machine.
pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_jobs_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.call("scancel", "--user=root")
    wait_for(lambda: not cluster.call("squeue", "--noheader"), PATIENCE)


@pytest.fixture(scope="module")
def config(cluster: Cluster) -> Path:
    return write_config(cluster.folder)


def test_job_trains_on_two_nodes(cluster: Cluster, config: Path) -> None:
    """The unmodified script with TP 2 x DP 2: ranks on another node cannot use localhost."""
    run_dir = cluster.folder / "smoke"
    number = cluster.launch(config, run_dir, *LAYOUT, "--train.steps=3", "--train.eval_interval=0", "--log.interval=1")
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), cluster.output(number)
    assert list(series(run_dir, "loss")) == [1, 2, 3]
    assert saved_steps(run_dir) == [3]
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (environment["launched_by"], environment["world_size"]) == ("slurm", 4)
    assert environment["layout"] | {"sequence_parallel": None} == {
        "tensor": 2,
        "pipeline": 1,
        "virtual_pipeline": 1,
        "sequence_parallel": None,
        "data": 2,
    }
    assert "start 1 on n[1-2]; newest checkpoint: none" in cluster.output(number)


def test_job_without_exports_runs_its_own_code(cluster: Cluster, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SBATCH_EXPORT=NONE, which some sites set."""
    run_dir = cluster.folder / "no_exports"
    monkeypatch.setitem(cluster.environment, "SBATCH_EXPORT", "NONE")
    setup = cluster.folder / "path.sh"
    setup.write_text(f"export PATH={os.environ['PATH']}\n")
    words = [*LAYOUT, "--snapshot", "--setup", str(setup), "--train.steps=3", "--train.eval_interval=0"]
    number = cluster.launch(config, run_dir, *words)
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), cluster.output(number)

    # A setup, say, that leads to other code: the ranks refuse what they import.
    stale = cluster.folder / "stale"
    shutil.copytree(run_dir / "launch/code", stale)
    script = run_dir / "launch/job.sbatch"
    edited = re.sub(r"(?m)^export PYTHONPATH=.*$", f"export PYTHONPATH={stale}", script.read_text())
    edited = edited.replace(f"run={run_dir}\n", f"run={cluster.folder}/other\n")
    script.with_name("edited.sbatch").write_text(edited)
    number = cluster.call("sbatch", "--parsable", script.with_name("edited.sbatch"))
    job = cluster.wait_until_ended(number)
    assert job["ExitCode"] == "2:0", cluster.output(number)
    assert f"--code {run_dir}/launch/code/griffin: griffin was imported from {stale}/griffin" in cluster.output(number)
    assert not (cluster.folder / "other").exists()


# What follows disturbs runs of so many steps, of 30 to 60 ms each on an idle machine of two cores.
STEPS = 140
SETTINGS = [f"--train.steps={STEPS}", "--checkpoint.interval=20", "--train.eval_interval=0", "--log.interval=1"]
SETTINGS += ["--optimizer.schedule=constant"]  # a shorter run's losses are the same


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, config: Path) -> Path:
    run_dir = cluster.folder / "uninterrupted"
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS)
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), cluster.output(number)
    return run_dir


def newest_step(run_dir: Path) -> int:
    """Return the newest step of a run."""
    return max(series(run_dir, "loss"), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def wait_for_step(run_dir: Path, step: int) -> None:
    wait_for(lambda: newest_step(run_dir) >= step, PATIENCE)


def attempts(run_dir: Path) -> int:
    return max(line["attempt"] for line in metrics(run_dir))


def same_losses(run_dir: Path, other: Path) -> None:
    """Assert that all logged losses and the last weights are bitwise those of the uninterrupted run."""
    expected = series(other, "loss")
    logged = [(line["step"], line["loss"]) for line in metrics(run_dir) if "loss" in line]
    assert {step for step, _ in logged} == expected.keys()
    assert all(loss == expected[step] for step, loss in logged)
    assert saved_files(run_dir, STEPS) == saved_files(other, STEPS)


def seconds_until(what: Callable[[], object], seconds: float = PATIENCE) -> float:
    start = time.monotonic()
    wait_for(what, seconds)
    return time.monotonic() - start


def report(what: str, seconds: float) -> None:
    """Print a time for readers of the test's output (-s or -rP)."""
    print(f"{what}: {seconds:.1f} s")


def test_signal_saves_requeues_and_resumes(cluster: Cluster, config: Path, uninterrupted: Path) -> None:
    run_dir = cluster.folder / "signal"
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS, "--snapshot")
    wait_for_step(run_dir, 50)
    cluster.call("scancel", "--batch", "--signal=USR1", number)  # as SLURM does ahead of the time limit
    report("signal to requeue", seconds_until(lambda: cluster.job(number)["Restarts"] == "1"))
    saved = saved_steps(run_dir)[-1]
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), cluster.output(number)
    assert attempts(run_dir) == 2
    same_losses(run_dir, uninterrupted)
    logged = [(line["attempt"], line["step"]) for line in metrics(run_dir) if "loss" in line]
    assert len(logged) == STEPS  # no step was made twice
    assert max(step for attempt, step in logged if attempt == 1) == saved
    output = cluster.output(number)
    assert "saved and stopped on request" in output
    assert f"start 2 on n[1-2]; newest checkpoint: step-{saved:08d}" in output
    assert not list((run_dir / "launch").glob("*.failures"))


def test_resumes_in_another_layout(cluster: Cluster, config: Path, uninterrupted: Path) -> None:
    """A run changes from tensor 2 x data 2 on two nodes to pipeline 2 on one."""
    run_dir = cluster.folder / "layout"
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS, "--train.steps=15")
    assert cluster.wait_until_ended(number)["JobState"] == "COMPLETED"
    words = ["--parallel.pipeline=2", "--train.micro_batch=4", *SETTINGS, "--train.steps=30"]
    second = cluster.launch(config, run_dir, *words, nodes=1)
    job = cluster.wait_until_ended(second)
    assert job["JobState"] == "COMPLETED", cluster.output(second)
    assert sorted(path.name for path in (run_dir / "launch").glob("*.sbatch")) == ["job-2.sbatch", "job.sbatch"]
    expected = {step: loss for step, loss in series(uninterrupted, "loss").items() if step <= 30}
    assert series(run_dir, "loss") == pytest.approx(expected, rel=1e-5)


def test_chain_and_cancel(cluster: Cluster, config: Path) -> None:
    """A cancelled job saves and is not requeued; the next in the chain completes the run; the last does nothing."""
    run_dir = cluster.folder / "chain"
    first = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS, "--train.steps=80", "--chain=3")
    others = [str(int(first) + i) for i in (1, 2)]
    wait_for_step(run_dir, 25)
    assert [cluster.job(number)["JobState"] for number in others] == ["PENDING", "PENDING"]
    cluster.call("scancel", first)
    job = cluster.wait_until_ended(first)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), cluster.output(first)
    saved = saved_steps(run_dir)[-1]
    assert saved == newest_step(run_dir) >= 25
    for number in others:
        assert cluster.wait_until_ended(number)["JobState"] == "COMPLETED", cluster.output(number)
    assert f"newest checkpoint: step-{saved:08d}" in cluster.output(others[0])
    assert "Nothing is left to do: step 80 of 80 is saved." in cluster.output(others[1])
    assert cluster.job(first)["Restarts"] == "0"


def test_preempted_job_saves_and_resumes(cluster: Cluster, config: Path, uninterrupted: Path) -> None:
    run_dir = cluster.folder / "preempted"
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS)
    wait_for_step(run_dir, 30)
    urgent = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=2", f"--output={cluster.folder}/urgent"]
    other = cluster.call("sbatch", "--parsable", *urgent, "--wrap", "true")
    report("preemption to the other job's end", seconds_until(lambda: cluster.job(other)["JobState"] == "COMPLETED"))
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), cluster.output(number)
    same_losses(run_dir, uninterrupted)
    logged = [line["step"] for line in metrics(run_dir) if "loss" in line]
    assert len(logged) == STEPS  # what had been done was saved


def test_killed_rank(cluster: Cluster, config: Path, uninterrupted: Path) -> None:
    run_dir = cluster.folder / "killed"
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS)
    wait_for_step(run_dir, 50)
    os.kill(cluster.ranks("n2")[0], signal.SIGKILL)
    report("death of a rank to requeue", seconds_until(lambda: cluster.job(number)["Restarts"] == "1"))
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), cluster.output(number)
    assert len((run_dir / f"launch/job-{number}.failures").read_text().splitlines()) == 1
    same_losses(run_dir, uninterrupted)


def test_power_cut_of_a_node(cluster: Cluster, config: Path, uninterrupted: Path) -> None:
    run_dir = cluster.folder / "power"
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS)
    wait_for_step(run_dir, 50)
    cluster.do("crash", "n2")
    report("power cut to requeue", seconds_until(lambda: cluster.job(number)["Restarts"] != "0"))
    cluster.do("node", "n2")
    job = cluster.wait_until_ended(number)
    assert job["JobState"] == "COMPLETED", cluster.output(number)
    same_losses(run_dir, uninterrupted)


def test_no_progress_ends_the_job(cluster: Cluster, config: Path) -> None:
    """Ranks fail in the same way each time: their interpreter exits, except in the dry run."""
    run_dir, python = cluster.folder / "failing", cluster.folder / "python"
    python.write_text(f'#!/bin/bash\ncase "$*" in *--dry-run|*" -c "*) exec {sys.executable} "$@";; esac\nexit 7\n')
    python.chmod(0o755)
    words = ["--python", str(python), "--max-restarts=1"]
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS, *words)
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "1"), cluster.output(number)
    assert "2 times in a row with no checkpoint newer than none: not retried" in cluster.output(number)


def test_full_disk(cluster: Cluster, config: Path, uninterrupted: Path) -> None:
    """Failed saves are reported; training continues, and saves again once there is space."""
    run_dir, filler = cluster.folder / "full", cluster.small / "filler"
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS, "--train.steps=20")
    assert cluster.wait_until_ended(number)["JobState"] == "COMPLETED", cluster.output(number)
    shutil.move(run_dir / "checkpoints", cluster.small / "checkpoints")  # as those do who have a larger disk for them
    (run_dir / "checkpoints").symlink_to(cluster.small / "checkpoints")
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**16)):
            pass
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS)
    wait_for(lambda: "CHECKPOINT FAILED" in cluster.output(number), PATIENCE)
    failed_at = newest_step(run_dir)
    filler.unlink()
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), cluster.output(number)
    assert "newest checkpoint: step-00000020" in cluster.output(number)
    assert 40 <= failed_at < STEPS
    assert 40 not in saved_steps(run_dir)
    same_losses(run_dir, uninterrupted)


def test_hung_rank_is_named(cluster: Cluster, config: Path, uninterrupted: Path) -> None:
    run_dir = cluster.folder / "hung"
    number = cluster.launch(config, run_dir, *LAYOUT, *SETTINGS, "--health.hang_seconds=10")
    wait_for_step(run_dir, 50)
    process = cluster.ranks("n2")[0]
    rank = rank_of(process)
    os.kill(process, signal.SIGSTOP)
    report("hang to requeue", seconds_until(lambda: cluster.job(number)["Restarts"] == "1"))
    job = cluster.wait_until_ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), cluster.output(number)
    (found,) = (run_dir / "hangs").glob("*/report.txt")
    assert re.search(rf"rank {rank} on n2 .*no sign of life", found.read_text()), found.read_text()
    same_losses(run_dir, uninterrupted)


def rank_of(process: int) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return int(dict(item.split(b"=", 1) for item in variables if item)[b"SLURM_PROCID"])


MPI_JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --output={folder}/mpi-%j.out --chdir={folder}
export OMP_NUM_THREADS=1
{command} {python} -P -m griffin.tools.cli train {config} --run-dir {run_dir} {settings}
"""


def batch(cluster: Cluster, config: Path, run_dir: Path, command: str, *settings: str) -> tuple[dict[str, str], str]:
    """Run a job that starts griffin train by `command`; return its final state and its output."""
    path = cluster.folder / "mpi.sbatch"
    text = MPI_JOB.format(
        folder=cluster.folder,
        command=command,
        python=sys.executable,
        config=config,
        run_dir=run_dir,
        settings=" ".join([*LAYOUT, "--train.steps=3", "--train.eval_interval=0", *settings]),
    )
    path.write_text(text)
    number = cluster.call("sbatch", "--parsable", path)
    job = cluster.wait_until_ended(number)
    return job, cluster.output(number)


@pytest.mark.parametrize(
    ("command", "source"),
    [
        ("{mpiexec} -n 4", "mpi"),
        ("srun --kill-on-bad-exit=1 --mpi=pmi2", "slurm"),
        ("srun --kill-on-bad-exit=1 --mpi=none", "slurm"),
    ],
)
def test_mpi_and_srun_train(cluster: Cluster, config: Path, mpiexec: Path, command: str, source: str) -> None:
    run_dir = cluster.folder / re.sub(r"\W", "", command)
    job, output = batch(cluster, config, run_dir, command.format(mpiexec=mpiexec))
    assert job["JobState"] == "COMPLETED", output
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (environment["launched_by"], environment["world_size"]) == (source, 4)


@pytest.mark.parametrize(
    ("command", "setting", "message"),
    [
        ("", "", "SLURM_NTASKS = 4, but this process was not started by srun: start it with"),
        ("", "--ranks 2", "SLURM_NTASKS = 4, but this process was not started by srun and --ranks is 2"),
        ("srun", "--ranks 2", "--ranks 2: this process is one of 4 ranks that slurm started; leave --ranks out"),
        ("srun {mpiexec} -launcher fork -n 1", "", "SLURM_NTASKS = 4 but mpi4py sees a world of 1"),
        ("srun {mpiexec} -launcher fork -n 2", "", "SLURM_NTASKS = 4 but mpi4py sees a world of 2"),
        ("{mpiexec} -n 2", "", "but mpi4py sees a world of 2"),
        ("{mpiexec} -n 6", "", "but mpi4py sees a world of 6"),
    ],
)
def test_worlds_that_disagree_are_refused(
    cluster: Cluster, config: Path, mpiexec: Path, command: str, setting: str, message: str
) -> None:
    run_dir = cluster.folder / "refused"
    job, output = batch(cluster, config, run_dir, command.format(mpiexec=mpiexec), setting)
    assert job["JobState"] == "FAILED", output
    assert message in output
    assert not run_dir.exists()


@pytest.fixture(scope="module")
def mpiexec() -> Path:
    path = Path(sys.executable).with_name("mpiexec")
    if not path.exists() or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("no mpiexec or no mpi4py")
    return path


def test_slurm_accepts_a_job_for_gpus(cluster: Cluster, config: Path) -> None:
    """Checked by `sbatch --test-only`: the cluster has two nodes with two GPUs, but not sixteen with eight."""
    run_dir = cluster.folder / "gpus"
    words = ["--time", "1-00:00:00", "--partition", "main", *LAYOUT]
    cluster.griffin("launch", "slurm", config, "--run-dir", run_dir, "--nodes", "2", "--gpus-per-node", "2", *words)
    cluster.call("sbatch", "--test-only", run_dir / "launch/job.sbatch")
    many = ["--nodes", "16", "--gpus-per-node", "8", "--train.global_batch=256"]
    cluster.griffin("launch", "slurm", config, "--run-dir", run_dir, *many, *words)
    with pytest.raises(AssertionError, match=r"Requested node configuration is not available|More processors"):
        cluster.call("sbatch", "--test-only", run_dir / "launch/job-2.sbatch")

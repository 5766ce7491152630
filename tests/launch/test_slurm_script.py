"""The batch script: its text for jobs of all sizes, and its behaviour with a fake srun and scontrol."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from griffin.launch.slurm import JobFiles, SlurmJob, render, time_seconds
from griffin.trainer.checkpoint import unreadable
from tests.small_runs import wait_for

SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def job(**settings: Any) -> SlurmJob:
    values: dict[str, Any] = {"name": "griffin-a", "nodes": 2, "gpus_per_node": 8, "time": "24:00:00"}
    return SlurmJob(**values | settings)


def files(folder: Path = Path("/data/runs/a"), **settings: Any) -> JobFiles:
    values: dict[str, Any] = {
        "run_dir": folder,
        "script": folder / "launch/job.sbatch",
        "config": folder / "launch/config.toml",
        "working": Path("/home/me"),
        "python": "/venv/bin/python",
        "python_path": ("/data/runs/a/launch/code",),
    }
    return JobFiles(**values | settings)


def directives(script: str) -> dict[str, str]:
    """Parse the directives as sbatch does: up to the first command."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert name not in found
            found[name] = value
        elif line and not line.startswith("#"):
            return found
    raise AssertionError("no command")


@pytest.mark.parametrize(
    "settings",
    [
        {"nodes": 2},
        {"nodes": 16, "partition": "gpu,big", "account": "lab", "qos": "high", "options": ("--reservation=april",)},
        {"nodes": 128, "container": "registry.example/lab#griffin:1", "mounts": (Path("/data"), Path("/home/me"))},
        {"nodes": 2, "gpus_per_node": 0, "tasks_per_node": 4, "cpus_per_task": 3},
    ],
)
def test_text(settings: dict, tmp_path: Path) -> None:
    slurm_job = job(**settings)
    path = tmp_path / "job.sbatch"
    path.write_text(render(slurm_job, files(setup=Path("/data/runs/a/launch/setup.sh"), init=("--init-from", "/w/2b"))))
    subprocess.run(["bash", "-n", path], check=True)
    checked = subprocess.run([SHELLCHECK, "--shell=bash", path], capture_output=True, text=True)
    assert checked.stdout == ""
    assert checked.returncode == 0

    found = directives(path.read_text())
    gpus = settings.get("gpus_per_node", 8)
    ranks = settings.get("tasks_per_node", 8)
    assert found.pop("nodes") == str(settings["nodes"])
    assert found.pop("ntasks-per-node") == str(ranks)
    assert (found.pop("gpus-per-node", "0"), "exclusive" in found, found.pop("mem", "")) == (
        (str(gpus), True, "0") if gpus else ("0", False, "")
    )
    found.pop("exclusive", "")
    assert found.pop("time") == "24:00:00"
    assert found.pop("signal") == "B:USR1@600"
    assert found.pop("output") == "/data/runs/a/launch/slurm-%j.out"
    assert found.pop("requeue") == ""
    asked_for = {"partition": slurm_job.partition, "account": slurm_job.account, "qos": slurm_job.qos}
    assert found == {
        "job-name": "griffin-a",
        "chdir": "/home/me",
        "open-mode": "append",
        "dependency": "singleton",
        **{name: value for name, value in asked_for.items() if value},
        **({"reservation": "april"} if slurm_job.options else {}),
        **({"cpus-per-task": "3"} if slurm_job.cpus_per_task else {}),
    }
    text = path.read_text()
    world = settings["nodes"] * ranks
    assert f"--nodes={settings['nodes']} --ntasks={world} --ntasks-per-node={ranks} " in text
    assert ("NCCL_DEBUG" in text) == bool(gpus)
    assert "localhost" not in text
    if slurm_job.container:
        assert "--container-image=registry.example/lab#griffin:1\n" in text
        assert '--container-mounts="/data:/data,/home/me:/home/me"\n' in text


@pytest.mark.parametrize(
    ("settings", "stated", "left_out"),
    [
        ({"gpu_type": "h100"}, {"gpus-per-node": "h100:8", "mem": "0", "exclusive": ""}, ["gres"]),
        ({"gpu_type": "h100", "gres": True}, {"gres": "gpu:h100:8"}, ["gpus-per-node"]),
        ({"exclusive": False, "mem": "200G"}, {"mem": "200G"}, ["exclusive"]),
        ({"exclusive": False}, {}, ["exclusive", "mem"]),
        ({"options": ("--mem=3G", "--no-requeue")}, {"mem": "3G", "no-requeue": ""}, ["requeue"]),
        ({"options": ("--mem-per-gpu=9G", "--open-mode=truncate")}, {"open-mode": "truncate"}, ["mem"]),
    ],
)
def test_site_options(settings: dict, stated: dict, left_out: list[str]) -> None:
    found = directives(render(job(**settings), files()))
    assert stated.items() <= found.items()
    assert not found.keys() & set(left_out)


def test_binding_to_cores() -> None:
    text = render(job(cpu_bind="ldoms"), files())
    assert "\n  --cpu-bind=ldoms\n" in text
    assert text.count("--cpu-bind") == 1


def test_apptainer(tmp_path: Path) -> None:
    image = tmp_path / "griffin.sif"
    with pytest.raises(ValueError, match=re.escape(f"--container {image}: no such file")):
        render(job(container=str(image)), files())
    image.touch()
    text = render(job(container=str(image), mounts=(Path("/data"),)), files(python="python3", python_path=()))
    assert f'train=(apptainer exec --nv --pwd /home/me --bind /data {image} "$python" -P -m griffin.tools.cli' in text
    assert "\nunset PYTHONPATH\n" in text
    assert "--container-image" not in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("5:30", 330),
        ("24:00:00", 86_400),
        ("2-12", 216_000),
        ("1-0:30", 88_200),
        ("1-00:00:01", 86_401),
        ("unlimited", None),
    ],
)
def test_time(text: str, seconds: int | None) -> None:
    assert time_seconds(text) == seconds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time": "a day"}, "--time a day: must be MINUTES, MM:SS, HH:MM:SS"),
        ({"time": "10"}, "--time 10: must be longer than --signal-seconds 600"),
        ({"nodes": 0}, "--nodes 0: must be at least 1"),
        ({"gpus_per_node": 0}, "--gpus-per-node 0: needs --tasks-per-node"),
        ({"tasks_per_node": 4}, "--tasks-per-node 4: must be --gpus-per-node 8, or left out"),
        ({"partition": "a b"}, "--partition a b: must consist of"),
        ({"signal_seconds": 70_000, "time": "2-0"}, "--signal-seconds 70000: must be at most 65535"),
        ({"options": ("--nodes=3",)}, "--sbatch-option --nodes=3: is set by the script itself"),
        ({"options": ("--tasks-per-node=3",)}, "--sbatch-option --tasks-per-node=3: is set by the script"),
        ({"options": ("-C gpu",)}, "--sbatch-option -C gpu: must be NAME or NAME=VALUE"),
        ({"container": "a image"}, "--container a image: must consist of"),
    ],
)
def test_invalid_jobs_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render(job(**settings), files())


@pytest.mark.parametrize("name", ["a b", "50%", 'a"b', "it's", "a\nb", "a$b", "a\\b", "a,b", "a:b"])
def test_unsafe_paths_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)--run-dir /data/.*SLURM mangles such paths"):
        render(job(), files(Path("/data") / name))


# What srun and scontrol do here: the dry run succeeds; a start of the training does what the file `plan` has on the
# line of its number, "CODE [NEWEST CHECKPOINT]". With code "wait" it ends by SIGUSR1, after a save and with 85.
SRUN = r"""#!/bin/bash
cd "$(dirname "$0")" || exit 1
echo "$*" >>calls
case "$*" in *--dry-run*) [ ! -e pause ] || { touch paused; sleep 1; }; exit "$(cat dry)";; esac
echo >>starts
read -r code step < <(sed -n "$(wc -l <starts)p" plan)
if [ "$code" = wait ]; then
  trap 'sleep 0.3; mkdir -p "run/checkpoints/$step"; exit 85' USR1
  trap 'echo TERM >>calls' TERM
  touch waiting
  while :; do sleep 0.05; done
fi
[ -z "$step" ] || mkdir -p "run/checkpoints/$step"
exit "$code"
"""
SCONTROL = r"""#!/bin/bash
cd "$(dirname "$0")" || exit 1
case $1 in
  show) [ ! -e down ] || { rm down; exit 1; }; echo "JobId=7 JobName=a JobState=$(cat state) Reason=None";;
  requeue) [ ! -e refuses ] && echo "$2" >>requeued;;
esac
"""


class FakeJob:
    """A job with the scripts above as srun and scontrol."""

    def __init__(
        self,
        folder: Path,
        *plan: str,
        max_restarts: int = 3,
        dry: int = 0,
        state: str = "RUNNING",
        setup: Path | None = None,
    ) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        (self.run_dir / "launch").mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(stat.S_IRWXU)
        (folder / "plan").write_text("\n".join(plan) + "\n")
        (folder / "dry").write_text(str(dry))
        (folder / "state").write_text(state)
        self.script = self.run_dir / "launch/job.sbatch"
        job_files = files(self.run_dir, working=folder, setup=setup)
        slurm_job = job(nodes=1, gpus_per_node=0, tasks_per_node=2, max_restarts=max_restarts)
        self.script.write_text(render(slurm_job, job_files))
        self.log = folder / "output"
        self.environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_CPUS_ON_NODE": "2",
        }

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen]:
        # A shell cannot trap what it was started to ignore, as earlier tests of this process may have left it.
        command = ["env", "--default-signal=USR1,TERM", "bash", str(self.script)]
        with self.log.open("a") as output:
            process = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run(self) -> int:
        with self.started() as process:
            return process.wait(20)

    @property
    def requeues(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().split()) if path.exists() else 0

    @property
    def output(self) -> str:
        return self.log.read_text()


def test_complete(tmp_path: Path) -> None:
    job_run = FakeJob(tmp_path, "0 step-00000009")
    assert job_run.run() == 0
    assert job_run.requeues == 0
    dry, real = (tmp_path / "calls").read_text().splitlines()
    run = f"/venv/bin/python -P -m griffin.tools.cli train {tmp_path}/run/launch/config.toml --run-dir {tmp_path}/run"
    assert dry.endswith(f"--nodes=1 --ntasks=1 --ntasks-per-node=1 {run} --ranks 2 --dry-run")
    options = "--label --kill-on-bad-exit=1 --mpi=none --cpu-bind=none --nodes=1 --ntasks=2 --ntasks-per-node=2"
    assert real == f"{options} {run}"


def test_configuration_errors_are_not_retried(tmp_path: Path) -> None:
    job_run = FakeJob(tmp_path, "0", dry=2)
    assert job_run.run() == 2
    assert not (tmp_path / "starts").exists()
    assert job_run.requeues == 0


def test_exit_code_2_after_the_check_is_a_failure(tmp_path: Path) -> None:
    """The check passes on the first node, but another may lack the file system, and srun then exits with 2 as well."""
    job_run = FakeJob(tmp_path, "2", "2", max_restarts=1)
    assert [job_run.run() for _ in range(2)] == [2, 2]
    assert job_run.requeues == 1


def test_stops_before_the_start_are_counted(tmp_path: Path) -> None:
    """Otherwise a job with too short a time limit would be requeued forever."""
    job_run = FakeJob(tmp_path, "0", max_restarts=1)
    (tmp_path / "pause").touch()
    for _ in range(2):
        with job_run.started() as process:
            wait_for((tmp_path / "paused").exists, 20)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(20) == 85
        (tmp_path / "paused").unlink()
    assert job_run.requeues == 1
    assert not (tmp_path / "starts").exists()
    assert "asked to stop before it began, exit code 85, 2 times in a row" in job_run.output


def test_a_restarting_controller_is_waited_for(tmp_path: Path) -> None:
    job_run = FakeJob(tmp_path, "85 step-00000004")
    (tmp_path / "down").touch()
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    (tmp_path / "sleep").chmod(stat.S_IRWXU)
    assert job_run.run() == 85
    assert job_run.requeues == 1
    assert "SLURM does not answer" in job_run.output


def test_any_setup_script(tmp_path: Path) -> None:
    """It may read unset variables, use the script's variable names, and leave the shell in strict mode."""
    setup = tmp_path / "setup.sh"
    setup.write_text("echo $UNHEARD_OF\nexport SET_UP=1 python=python2 run=/\nset -eo pipefail\n")
    job_run = FakeJob(tmp_path, "137", "0 step-00000009", setup=setup)
    assert [job_run.run() for _ in range(2)] == [137, 0]
    assert job_run.requeues == 1
    assert "/venv/bin/python -P" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_saves_and_requeues(tmp_path: Path, number: signal.Signals) -> None:
    job_run = FakeJob(tmp_path, "wait step-00000004")
    with job_run.started() as process:
        wait_for((tmp_path / "waiting").exists, 20)
        process.send_signal(number)
        assert process.wait(20) == 85
    assert job_run.requeues == 1
    assert f"{number.name}: asking the ranks to save and stop" in job_run.output
    assert "requeued: resumes from checkpoint step-00000004" in job_run.output
    assert "TERM" not in (tmp_path / "calls").read_text()  # srun would end the ranks at once


def test_cancelled_job_is_not_requeued(tmp_path: Path) -> None:
    job_run = FakeJob(tmp_path, "85 step-00000004", state="CANCELLED")
    assert job_run.run() == 85
    assert job_run.requeues == 0
    assert "SLURM is ending this job (JobState=CANCELLED): not requeued from here" in job_run.output


def test_failed_requeue_says_what_to_do(tmp_path: Path) -> None:
    job_run = FakeJob(tmp_path, "85 step-00000004")
    (tmp_path / "refuses").touch()
    assert job_run.run() == 85
    assert "submit it again to resume from checkpoint step-00000004" in job_run.output


def test_failures_are_retried_while_there_is_progress(tmp_path: Path) -> None:
    plan = ("137", "86", "1 step-00000002", "143", "137 step-00000002", "86 step-00000004", "1", "1")
    job_run = FakeJob(tmp_path, *plan, max_restarts=2)
    codes = [job_run.run() for _ in range(5)]
    assert codes == [137, 86, 1, 143, 137]
    assert job_run.requeues == 4  # the third failure in a row at step 2 is the last
    assert "failed with exit code 137, 3 times in a row with no checkpoint newer than step-00000002" in job_run.output
    assert [job_run.run() for _ in range(3)] == [86, 1, 1]  # had it been submitted again
    assert job_run.requeues == 6
    lines = (tmp_path / "run/launch/job-7.failures").read_text().splitlines()
    assert len(lines) == 8
    assert lines[1].endswith(" code 86 newest none")


def test_a_rewound_run_has_made_no_progress(tmp_path: Path) -> None:
    job_run = FakeJob(tmp_path, "1 step-00000008", "1", "1", max_restarts=2)
    assert job_run.run() == 1
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step-00000004").mkdir()
    (checkpoints / "step-00000008").rename(checkpoints / "step-00000008.spiked-1")
    assert job_run.run() == 1
    assert "failure 2 with no checkpoint newer than step-00000004" in job_run.output
    (checkpoints / "step-00000008").mkdir()
    assert job_run.run() == 1
    assert "failed with exit code 1, 3 times in a row with no checkpoint newer than step-00000008" in job_run.output


def test_unreadable_newest_checkpoint_is_reported(tmp_path: Path) -> None:
    """It is reported, and counts as no progress; a checkpoint saved again since is not reported."""
    job_run = FakeJob(tmp_path, "1 step-00000008", "1", "1", max_restarts=2)
    assert job_run.run() == 1
    assert "cannot be read back" not in job_run.output
    folder, noted = tmp_path / "run/checkpoints/step-00000008", tmp_path / "run" / unreadable.NAME
    noted.write_text("step-00000004 is missing\nstep-00000008 c/0 is damaged\n")
    assert job_run.run() == 1
    assert "failure 2 with no checkpoint newer than step-00000008" in job_run.output
    told = "the newest checkpoint cannot be read back, and restarting does not help: step-00000008 c/0 is damaged"
    assert job_run.output.count(told) == 1
    os.utime(folder, (noted.stat().st_mtime + 1,) * 2)
    assert job_run.run() == 1
    assert job_run.output.count(told) == 1
    assert job_run.requeues == 2


def test_failure_that_cannot_be_recorded_ends_the_job(tmp_path: Path) -> None:
    job_run = FakeJob(tmp_path, "137")
    (tmp_path / "run/launch/job-7.failures").mkdir()
    assert job_run.run() == 137
    assert job_run.requeues == 0
    assert "not retried" in job_run.output


def test_a_job_ends_no_earlier_than_its_ranks(tmp_path: Path) -> None:
    """Several signals while ranks save: the script keeps waiting."""
    job_run = FakeJob(tmp_path, "wait step-00000004")
    with job_run.started() as process:
        wait_for((tmp_path / "waiting").exists, 20)
        for _ in range(3):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        assert process.wait(20) == 85
    assert (tmp_path / "run/checkpoints/step-00000004").is_dir()

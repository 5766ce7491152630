"""`griffin launch`: what it writes, submits, restarts and refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import griffin.tools.commands.launch
from griffin.launch import code
from griffin.parallel.world.ranks import STOPPED
from griffin.tools.cli import main
from griffin.trainer.checkpoint import unreadable
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.step_name import step_name
from griffin.trainer.settings.complete import load_config
from tests.ranks import RankError, RankPool
from tests.small_runs import metrics, run, saved_steps, series, snapshot, wait_for, write_config

JOB = ["--nodes", "2", "--gpus-per-node", "2", "--time", "1:00:00"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_ID", "SLURM_NTASKS", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    return write_config(tmp_path)


def test_job_is_written_beside_its_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "slurm", str(config), *JOB, "--run-dir", "runs/a", "--parallel.tensor=2"]
    assert main(words) == 0
    run_dir = config.parent / "runs/a"
    folder = run_dir / "launch"
    script = (folder / "job.sbatch").read_text()
    captured = capsys.readouterr()
    assert captured.out == script + "\n"
    assert captured.err.splitlines()[-1] + "\n" == f"griffin: to submit it: sbatch {folder}/job.sbatch\n"
    assert re.search("#SBATCH --job-name=griffin-a-[0-9a-f]{6}\n", script)
    assert f"#SBATCH --chdir={config.parent}\n" in script  # where relative paths of data lead as they do here
    assert load_config(folder / "config.toml") == load_config(config, ["--parallel.tensor=2"])
    code = json.loads((folder / "code.json").read_text())
    assert Path(code["package"]).name == "griffin"
    assert {"version", "commit", "untracked"} <= code.keys()

    written = snapshot(folder)
    assert main(words) == 0  # once more: nothing is overwritten
    assert snapshot(folder).items() > written.items()
    assert f"config={folder}/config-2.toml\n" in (folder / "job-2.sbatch").read_text()

    # `griffin train` accepts the run folder with the job's files.
    RunFolder.check(run_dir, load_config(config))
    assert RunFolder.create(run_dir, load_config(config), {}).attempt == 1
    assert (folder / "job.sbatch").read_text() == script


@pytest.mark.parametrize("words", [["--sbatch-option", "reservation=april"], ["--sbatch-option=--reservation=april"]])
def test_further_options_of_sbatch(config: Path, words: list[str]) -> None:
    assert main(["launch", "slurm", str(config), *JOB, "--run-dir", "run", *words]) == 0
    assert "\n#SBATCH --reservation=april\n" in (config.parent / "run/launch/job.sbatch").read_text()


@pytest.mark.parametrize(("run_dir", "warns"), [("local/run", True), ("link/run", True), ("local-not/run", False)])
def test_run_folders_that_nodes_do_not_share(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_dir: str, warns: bool
) -> None:
    assert {"/tmp", "/dev/shm"} <= set(griffin.tools.commands.launch.NODE_LOCAL)
    local = config.parent.resolve() / "local"
    local.mkdir()
    Path("link").symlink_to(local)
    monkeypatch.setattr(griffin.tools.commands.launch, "NODE_LOCAL", (str(local),))
    assert main(["launch", "slurm", str(config), *JOB, "--run-dir", run_dir]) == 0
    warning = f"warning: --run-dir {config.parent / run_dir}: is below {local}, which may be local to each node"
    assert (warning in capsys.readouterr().err) == warns


def test_changes_in_any_encoding_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "trainer").mkdir(parents=True)
    note = checkout / "note"

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(checkout), *who, *words], check=True, capture_output=True)

    git("init")
    note.write_bytes(b"plain\n")
    git("add", ".")
    git("commit", "-m", "a")
    note.write_bytes("Größe\r\n".encode("latin-1"))
    monkeypatch.setattr(code, "PACKAGE", checkout)
    code.write_version(tmp_path / "code.json")
    note.write_bytes(b"plain\n")
    git("apply", str(tmp_path / "code.diff"))
    assert note.read_bytes() == "Größe\r\n".encode("latin-1")


def test_what_a_container_mounts_is_there(config: Path) -> None:
    words = ["--container", "lab/griffin:1", "--run-dir", "run", "--data.cache=indexes/a"]
    assert main(["launch", "slurm", str(config), *JOB, *words]) == 0
    script = (config.parent / "run/launch/job.sbatch").read_text()
    mounts = script.partition('--container-mounts="')[2].partition('"')[0].split(",")
    assert f"{config.parent}/indexes/a:{config.parent}/indexes/a" in mounts
    assert all(Path(mount.partition(":")[0]).is_dir() for mount in mounts)


def test_snapshot_is_what_the_job_imports(config: Path) -> None:
    assert main(["launch", "slurm", str(config), *JOB, "--run-dir", "run", "--snapshot"]) == 0
    folder = config.parent / "run/launch"
    assert f"export PYTHONPATH={folder}/code" in (folder / "job.sbatch").read_text()
    command = [sys.executable, "-P", "-c", "import griffin.tools.commands.train as t; print(t.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(folder / "code")}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    assert Path(found.strip()) == folder / "code/griffin/tools/commands/train.py"
    assert not any(path.is_symlink() for path in (folder / "code").rglob("*"))
    assert (folder / "code/griffin/launch/templates/job.sbatch").is_file()


def test_submission_of_a_chain(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\necho "$((40 + $(wc -l <{tmp_path}/calls)));cluster"\n'
    )
    sbatch.chmod(0o700)
    assert main(["launch", "slurm", str(config), *JOB, "--run-dir", "run", "--submit", "--chain", "2"]) == 0
    script = f"{tmp_path}/run/launch/job.sbatch"
    assert capsys.readouterr().out == f"Submitted job 41: {script}\nSubmitted job 42: {script}\n"
    assert (tmp_path / "calls").read_text() == f"--parsable {script}\n" * 2
    sbatch.write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    assert main(["launch", "slurm", str(config), *JOB, "--run-dir", "other", "--submit"]) == 2
    assert "job.sbatch: sbatch: error: invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "3"], "train.global_batch = 8: must be a multiple of"),
        (["--parallel.tensor", "3"], "parallel.tensor = 3: must divide"),
        (["--data.train", "absent"], "absent"),
        (["--gpus-per-node", "h100"], "--gpus-per-node h100: must be a number, or TYPE:NUMBER"),
        (["--time", "soon"], "--time soon: must be MINUTES"),
        (["--run-dir", "a b"], "SLURM mangles such paths"),
        (["--run-dir", "config.toml"], "--run-dir config.toml: exists and is not an empty folder"),
        (["--setup", "absent.sh"], "--setup absent.sh: no such file"),
        (["--container", "absent.sif"], "absent.sif: no such file"),
        (["--container", "absent.sqsh"], "absent.sqsh: no such file"),
        (["--mount", "absent"], "--mount absent: no such folder"),
        (["--python", "/absent/python"], "--python /absent/python: does not start"),
        (["--python", "/usr/bin/false"], "--python /usr/bin/false: cannot import"),
        (["--init-from", "absent"], "absent"),
        (["--chain", "0"], "--chain 0: must be at least 1"),
        (["--max-restarts", "-1"], "--max-restarts -1: must be at least 0"),
        (["--submit"], "--submit: there is no sbatch on this machine"),
    ],
)
def test_refused_before_anything_is_written(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    if words == ["--submit"]:
        monkeypatch.setenv("PATH", str(config.parent))
    before = snapshot(config.parent)
    assert main(["launch", "slurm", str(config), *JOB, "--run-dir", "run", *words]) == 2
    assert message in capsys.readouterr().err
    assert snapshot(config.parent) == before
    assert not Path("run").exists()


class Starts:
    """Stands for trainings: each call writes the next checkpoints and returns the next exit code."""

    def __init__(self, checkpoints: Path, plan: list[tuple[int, int | None]]) -> None:
        self.checkpoints, self.plan, self.count = checkpoints, plan, 0

    def __call__(self) -> int:
        code, step = self.plan[self.count]
        self.count += 1
        if step is not None:
            (self.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        return code


@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [
        ([(0, None)], 0, 1),
        ([(STOPPED, 4)], STOPPED, 1),
        ([(143, None)], 143, 1),
        ([(130, None)], 130, 1),
        ([(137, 2), (0, 6)], 0, 2),
        ([(1, None)] * 3, 1, 3),
        ([(1, None), (1, None), (137, 2), (86, None), (137, None)], 137, 5),
    ],
)
def test_local_starts_again_while_there_is_progress(
    config: Path, monkeypatch: pytest.MonkeyPatch, plan: list[tuple[int, int | None]], code: int, starts: int
) -> None:
    pretended = Starts(Path("run/checkpoints"), plan)
    monkeypatch.setattr(griffin.tools.commands.launch, "start_local", lambda args: pretended)
    assert main(["launch", "local", str(config), "--ranks", "2", "--run-dir", "run", "--max-restarts", "2"]) == code
    assert pretended.count == starts


def test_local_says_that_the_newest_checkpoint_cannot_be_read_back(
    config: Path, rank_pool: RankPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chunk's bytes differ from what was saved, which the training itself finds out."""
    run_dir = config.parent / "run"

    def start(steps: int) -> int:
        settings = [f"--train.steps={steps}", "--checkpoint.interval=1", "--train.eval_interval=0"]
        try:
            return int(rank_pool.run(run, 1, load_config(config, settings), run_dir)[0])
        except RankError:
            return 1

    assert start(2) == 0
    folder = run_dir / "checkpoints" / step_name(2)
    chunk = max(
        (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"),
        key=lambda path: path.stat().st_size,
    )
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr(griffin.tools.commands.launch, "start_local", lambda args: lambda: start(3))
    assert main(["launch", "local", str(config), "--run-dir", str(run_dir), "--max-restarts", "0"]) == 1
    said = capsys.readouterr().err
    told = f"griffin: the newest checkpoint cannot be read back, and restarts do not mend it: {folder.name} {chunk} is"
    assert said.count(told) == 1
    assert "failed 1 times in a row with the checkpoint of step 2 as the newest: not tried again" in said

    chunk.write_bytes(content[:-1])  # a size is looked at before anything is loaded: the one before it is taken
    assert start(3) == 0
    assert (run_dir / unreadable.NAME).read_text().startswith(f"{folder.name} {chunk} has ")
    assert unreadable.why_unreadable(run_dir, folder) == ""  # it was saved anew
    assert start(3) == 0
    assert not (run_dir / unreadable.NAME).exists()


def test_local_is_not_started_by_another_launcher(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["launch", "local", str(config), "--ranks", "2"]) == 2
    assert "--ranks 2: this process is one of 2 ranks that torchrun started" in capsys.readouterr().err


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
def test_local_run_goes_on_after_a_killed_rank(config: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher saves, and ends it without a restart."""
    run_dir, patience = tmp_path / "run", 120.0  # seconds; it takes 15 on an idle machine
    settings = ["--train.steps=1000", "--train.micro_batch=4", "--checkpoint.interval=10", "--log.interval=1"]
    command = [sys.executable, "-P", "-m", "griffin.tools.cli", "launch", "local", str(config), "--ranks", "2"]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, "--run-dir", str(run_dir), *settings], stdout=output, stderr=output, start_new_session=True
        )

    def made() -> int:
        return max(series(run_dir, "loss"), default=0) if (run_dir / "metrics.jsonl").exists() else 0

    try:
        wait_for(lambda: made() >= 25, patience)
        (server,) = [pid for pid in children(process.pid) if len(children(pid)) == 2]  # the ranks are forked from it
        os.kill(children(server)[1], signal.SIGKILL)
        wait_for(lambda: max(line["attempt"] for line in metrics(run_dir)) == 2 and made() >= 40, patience)
        process.send_signal(signal.SIGTERM)
        assert process.wait(patience) == STOPPED
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = (tmp_path / "output").read_text()
    assert "griffin: failed with exit code 137: starting again from the checkpoint of step" in said
    assert saved_steps(run_dir)[-1] == max(line["step"] for line in metrics(run_dir) if line["attempt"] == 2)

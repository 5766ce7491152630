"""SLURM cluster of `slurm_cluster.sh` for tests: jobs on two nodes with two cores, and injected failures."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_suffix(".sh")
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged", "ip", "unshare", "setsid")
# Not /tmp nor /dev/shm, of which every node has its own.
SHARED_FOLDER = Path("/var/tmp")
PATIENCE = 300.0  # seconds; the slowest, the start of a job on two nodes, takes 15 on an idle machine


def why_not() -> str:
    """Return why this machine cannot run the cluster; "" if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}: install slurmctld, slurmd, slurm-client and munge"
    if os.geteuid() != 0:
        return "the SLURM cluster's namespaces need root"
    attempt = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--net", "--fork", "--mount-proc", "true"]
    if subprocess.run(attempt, capture_output=True).returncode != 0:
        return "this machine does not let root make namespaces"
    return ""


class Cluster:
    """`folder` is on a disk shared by the nodes, `small` a shared file system of SMALL bytes."""

    SMALL = 24 * 2**20

    def __init__(self, folder: Path) -> None:
        self.folder, self.small = folder, folder / "small"
        names = [name for name in os.environ if re.match("SLURM_|SBATCH_|PMI|OMPI_", name)]
        self.environment = {name: value for name, value in os.environ.items() if name not in names}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        # The test process's own CUDA_VISIBLE_DEVICES and thread counts stay: they reach the jobs.

    def call(self, *command: str | Path, timeout: float = 60) -> str:
        """Run a command that must succeed, and return its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def do(self, what: str, *words: str) -> None:
        """ "up", "down", "crash" or "node"."""
        outside = [
            path for path in (ROOT, Path(sys.prefix)) if path.is_relative_to("/tmp") or path.is_relative_to("/dev")
        ]
        shared = {"SHARED": " ".join(map(str, [*outside, self.small]))}
        with (self.folder / "output").open("a") as output:  # no pipe: daemons inherit it
            subprocess.run(
                ["env", "--default-signal", "bash", SCRIPT, what, self.folder, *words],  # jobs inherit what is ignored
                env=self.environment | shared,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
                timeout=60,
            )

    def griffin(self, *words: str | Path) -> str:
        return self.call(sys.executable, "-P", "-m", "griffin.tools.cli", *map(str, words))

    def launch(self, config: Path, run_dir: Path, *words: str, nodes: int = 2) -> str:
        """Submit a job with `griffin launch slurm`, with two ranks per node, and return its number."""
        shape = ["--nodes", str(nodes), "--gpus-per-node", "0", "--tasks-per-node", "2", "--time", "30"]
        output = self.griffin("launch", "slurm", config, "--run-dir", run_dir, *shape, "--submit", *words)
        match = re.match(r"Submitted job (\d+)", output)
        assert match is not None, output
        return match[1]

    def job(self, number: str) -> dict[str, str]:
        """Return SLURM's description of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "--oneliner", number)))

    def wait(self, number: str, what: Callable[[dict[str, str]], object], seconds: float = PATIENCE) -> dict[str, str]:
        """Wait until `what` is true of SLURM's description of a job."""
        deadline = time.monotonic() + seconds
        while not what(job := self.job(number)):
            assert time.monotonic() < deadline, f"{job}\n{self.output(number)}"
            time.sleep(0.1)
        return job

    def wait_until_ended(self, number: str, seconds: float = PATIENCE) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait(number, lambda job: job["JobState"] in ended, seconds)

    def output(self, number: str) -> str:
        path = Path(self.job(number)["StdOut"])
        return path.read_text() if path.exists() else ""

    def ranks(self, node: str) -> list[int]:
        """Return the ids, on this machine, of the processes of a node's ranks."""
        return [pid for pid in self._processes(node) if b"--run-dir" in _command(pid)]

    def _processes(self, node: str) -> list[int]:
        init = int((self.folder / "run" / f"{node}.init").read_text())
        space = os.readlink(f"/proc/{init}/ns/pid")
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _link(path / "ns/pid") == space]


def _command(pid: int) -> bytes:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return b""
    return b" ".join(words) if b"python" in words[0] and b"--dry-run" not in words else b""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """One at a time on this machine."""
    with ExitStack() as stack:
        lock = stack.enter_context(open("/var/tmp/griffin-slurm-cluster.lock", "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = Path(tempfile.mkdtemp(prefix="griffin-slurm-", dir=SHARED_FOLDER))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = Cluster(folder)
        cluster.small.mkdir()
        cluster.call("mount", "-t", "tmpfs", "-o", f"size={cluster.SMALL}", "small", cluster.small)
        stack.callback(lambda: subprocess.run(["umount", "--lazy", cluster.small], check=False))
        stack.callback(cluster.do, "down")
        cluster.do("up", "2", "2")
        yield cluster

"""Batch script of a SLURM job that trains until the run is complete: validation and rendering."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

TEMPLATES = Path(__file__).with_name("templates")

# Paths that are safe without quotes in the script, in SLURM's directives (where % starts a pattern), and in lists of
# mounts and import paths, which are separated by commas and colons.
PLAIN_PATH = re.compile(r"[\w./+=@-]+")
IMAGE_FILES = (".sif", ".sqsh")  # of Apptainer, and of enroot for pyxis; other images are names in a registry
MAX_SIGNAL_SECONDS = 65_535  # SLURM's limit
# sbatch options that the script relies on: only settable by options of `griffin launch slurm`.
RESERVED_OPTIONS = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "tasks-per-node", "gpus-per-node", "gpus-per-task", "gres",
    "cpus-per-task", "time", "chdir", "signal", "array", "wrap",
)  # fmt: skip

OVERRIDDEN_OPTIONS = {"--no-requeue": "--requeue", "--mem-per-cpu": "--mem", "--mem-per-gpu": "--mem"}


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """Resources of a job and how it starts its ranks: one per GPU, or `tasks_per_node` without GPUs."""

    name: str
    nodes: int
    gpus_per_node: int
    gpu_type: str = ""  # the site's name of it; "" accepts any
    gres: bool = False  # request GPUs by --gres, for sites without --gpus-per-node
    exclusive: bool = True  # whole nodes, for nodes with GPUs
    mem: str = ""  # per node; "" is all memory of nodes with GPUs, else the site's default
    cpu_bind: str = ""  # srun's option; "" leaves binding to the ranks, or to --cpus-per-task if set
    time: str  # in SLURM's notation: minutes, HH:MM:SS, D-HH:MM:SS and so on
    tasks_per_node: int = 0  # ranks per node; 0 is one per GPU
    cpus_per_task: int = 0  # 0: all cores of the node are shared by its ranks
    partition: str = ""
    account: str = ""
    qos: str = ""
    container: str = ""  # image: a .sif file for Apptainer, anything else for SLURM's pyxis
    mounts: tuple[Path, ...] = ()  # folders to mount in the container
    signal_seconds: int = 600  # before the time limit, when ranks are asked to save
    max_restarts: int = 3  # after failures without a newer checkpoint in between
    options: tuple[str, ...] = ()  # further sbatch options, such as "--reservation=april"

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def validate(self) -> None:
        """Raise ValueError for values that SLURM would refuse or mangle."""
        for option, number, least in (
            ("--nodes", self.nodes, 1),
            ("--gpus-per-node", self.gpus_per_node, 0),
            ("--tasks-per-node", self.tasks_per_node, 0),
            ("--cpus-per-task", self.cpus_per_task, 0),
            ("--signal-seconds", self.signal_seconds, 1),
            ("--max-restarts", self.max_restarts, 0),
        ):
            if number < least:
                _refuse(option, number, f"must be at least {least}")
        if self.ranks_per_node == 0:
            _refuse("--gpus-per-node", 0, "needs --tasks-per-node, the number of ranks on each node's CPUs")
        if self.gpus_per_node and self.tasks_per_node not in (0, self.gpus_per_node):
            _refuse(
                "--tasks-per-node", self.tasks_per_node, f"must be --gpus-per-node {self.gpus_per_node}, or left out"
            )
        seconds = time_seconds(self.time)
        if self.signal_seconds > MAX_SIGNAL_SECONDS:
            _refuse("--signal-seconds", self.signal_seconds, f"must be at most {MAX_SIGNAL_SECONDS}")
        if seconds is not None and seconds <= self.signal_seconds:
            accepted = (
                f"must be longer than --signal-seconds {self.signal_seconds}, which are reserved for saving at its end"
            )
            _refuse("--time", self.time, accepted)
        for option, text in (
            ("--job-name", self.name),
            ("--gpus-per-node", self.gpu_type),
            ("--mem", self.mem),
            ("--partition", self.partition),
            ("--account", self.account),
            ("--qos", self.qos),
        ):
            if text and not re.fullmatch(r"[\w.,+=@-]+", text):
                _refuse(option, text, "must consist of letters, digits and ._+=@-")
        for option in self.options:
            match = re.fullmatch(r"--([a-z-]+)(=[^\s\"'\\`$]+)?", option)
            if match is None:
                _refuse("--sbatch-option", option, "must be NAME or NAME=VALUE, without spaces and quotes")
            if match[1] in RESERVED_OPTIONS:
                _refuse("--sbatch-option", option, "is set by the script itself")
        if self.cpu_bind and not re.fullmatch(r"[\w,:-]+", self.cpu_bind):
            _refuse("--cpu-bind", self.cpu_bind, "must be a value of srun's --cpu-bind, such as cores or ldoms")
        if self.container and not re.fullmatch(r"[\w./+=@:#-]+", self.container):
            _refuse("--container", self.container, "must consist of letters, digits and ._/+=@:#-")
        for folder in self.mounts:
            check_path("--mount", str(folder))
        if self.container.endswith(IMAGE_FILES) and not Path(self.container).is_file():
            _refuse("--container", self.container, "no such file")

    @property
    def is_apptainer(self) -> bool:
        return self.container.endswith(".sif")


@dataclass(frozen=True, kw_only=True)
class JobFiles:
    """Absolute paths that the job uses. `python` may be the name of a command in a container."""

    run_dir: Path
    script: Path
    config: Path
    working: Path  # working folder, to which relative paths of the config refer
    python: str
    python_path: tuple[str, ...] = ()  # $PYTHONPATH
    setup: Path | None = None  # shell commands to run first, such as loading modules
    init: tuple[str, ...] = ()  # --init-from PATH, --init-what
    code: str = ""  # the package that ranks must import; "" for the container image's own

    def validate(self) -> None:
        """Raise ValueError for paths that cannot be used in a batch script."""
        for option, path in (
            ("--run-dir", str(self.run_dir)),
            ("--python", self.python),
            ("--init-from", self.init[1] if self.init else ""),
            ("working folder", str(self.working)),
            ("code", self.code),
            *(("PYTHONPATH", entry) for entry in self.python_path),
        ):
            if path:
                check_path(option, path)


def check_path(option: str, path: str) -> None:
    """Raise ValueError for a path that SLURM or a shell would misread."""
    if not PLAIN_PATH.fullmatch(path):
        _refuse(option, path, "SLURM mangles such paths: must consist of letters, digits and ._/+=@-")


def time_seconds(text: str) -> int | None:
    """Parse a time limit in SLURM's notation to seconds; None means no limit. ValueError if it is malformed."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        _refuse("--time", text, "must be MINUTES, MM:SS, HH:MM:SS, DAYS-HH, DAYS-HH:MM, DAYS-HH:MM:SS or UNLIMITED")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1] or match[4]:  # the first number is hours
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second  # MINUTES, or MINUTES:SECONDS


def render(job: SlurmJob, files: JobFiles) -> str:
    """Return the batch script. ValueError if it would not work."""
    files.validate()
    job.validate()
    where = f"{job.gpus_per_node} GPUs" if job.gpus_per_node else f"{job.ranks_per_node} ranks on CPUs"
    values = {
        "title": f"{job.name}: {job.world_size} ranks on {job.nodes} node{'s' * (job.nodes > 1)} of {where}.",
        "script": str(files.script),
        "directives": "\n".join(_directives(job, files)),
        "run": str(files.run_dir),
        "config": str(files.config),
        "python": files.python,
        "max_restarts": str(job.max_restarts),
        "setup": f"# shellcheck source=/dev/null\n. {files.setup}\n\n" if files.setup else "",
        "pythonpath": f"export PYTHONPATH={':'.join(files.python_path)}" if files.python_path else "unset PYTHONPATH",
        "gpus": (TEMPLATES / "gpus.sh").read_text(encoding="utf-8") if job.gpus_per_node else "",
        "options": "\n".join(f"  {option}" for option in _step_options(job, files)),
        "container": _apptainer(job, files),
        "code": f" --code {files.code}" if files.code else "",
        "init": "".join(f" {word}" for word in files.init),
        "nodes": str(job.nodes),
        "tasks_per_node": str(job.ranks_per_node),
        "world_size": str(job.world_size),
    }
    template = (TEMPLATES / "job.sbatch").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _directives(job: SlurmJob, files: JobFiles) -> list[str]:
    gpus = f"{job.gpu_type}:{job.gpus_per_node}" if job.gpu_type else f"{job.gpus_per_node}"
    lines = [
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={job.nodes}",
        f"#SBATCH --ntasks-per-node={job.ranks_per_node}",
    ]
    if job.gpus_per_node:
        lines += [
            "# All ranks of a node see all of its GPUs, and each uses the one of its local rank. With --gpus-per-task",
            "# a rank would see only its own, which hides the direct links between GPUs from NCCL.",
            f"#SBATCH --{'gres=gpu:' if job.gres else 'gpus-per-node='}{gpus}",
            "# Memory per node, for data loaders and checkpoints being written. 0 requests all of it.",
        ]
        lines += ["#SBATCH --exclusive"] if job.exclusive else []
    memory = job.mem or ("0" if job.gpus_per_node and job.exclusive else "")
    lines += [f"#SBATCH --mem={memory}"] if memory else []
    if job.cpus_per_task:
        lines += [f"#SBATCH --cpus-per-task={job.cpus_per_task}"]
    lines += [f"#SBATCH --time={job.time}"]
    billed = {"partition": job.partition, "account": job.account, "qos": job.qos}
    lines += [f"#SBATCH --{option}={text}" for option, text in billed.items() if text]
    lines += [
        f"#SBATCH --chdir={files.working}",
        f"#SBATCH --output={files.script.parent}/slurm-%j.out",
        "# A requeued job appends to its output.",
        "#SBATCH --open-mode=append",
        f"# SIGUSR1 to this shell (B:) {job.signal_seconds} s before the time limit, or up to a minute earlier:",
        "# enough for a step and a save.",
        f"#SBATCH --signal=B:USR1@{job.signal_seconds}",
        "# After a node failure or preemption, SLURM requeues the job by itself.",
        "#SBATCH --requeue",
        "# One job of this name at a time: two would write to the same run folder.",
        "#SBATCH --dependency=singleton",
    ]
    # Further options replace directives of the same name, so none appears twice.
    extra = {option.partition("=")[0]: option for option in job.options}
    replaced = {OVERRIDDEN_OPTIONS.get(name, name) for name in extra} | set(extra)
    lines = [line for line in lines if line.removeprefix("#SBATCH ").partition("=")[0] not in replaced]
    return lines + [f"#SBATCH {option}" for option in extra.values()]


def _step_options(job: SlurmJob, files: JobFiles) -> list[str]:
    if job.cpus_per_task:
        options = [f"--cpus-per-task={job.cpus_per_task}  # sbatch's does not reach srun"]
    else:
        options = ["--cpu-bind=none      # ranks bind themselves to the cores near their GPUs"]
    if job.cpu_bind:
        options = [option for option in options if not option.startswith("--cpu-bind")] + [f"--cpu-bind={job.cpu_bind}"]
    if job.container and not job.is_apptainer:
        mounts = ",".join(f"{path}:{path}" for path in job.mounts)
        options += [f"--container-image={job.container}", f"--container-workdir={files.working}"]
        options += [f'--container-mounts="{mounts}"'] if mounts else []
    return options


def _apptainer(job: SlurmJob, files: JobFiles) -> str:
    if not job.is_apptainer:
        return ""
    binds = "".join(f"--bind {path} " for path in job.mounts)
    nvidia = "--nv " if job.gpus_per_node else ""
    return f"apptainer exec {nvidia}--pwd {files.working} {binds}{job.container} "


def _refuse(option: str, value: object, accepted: str) -> NoReturn:
    raise ValueError(f"{option} {value}: {accepted}")

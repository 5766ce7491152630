"""Checks of an installation for `griffin doctor`, each on this process alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import secrets
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from griffin.kernels.backends import AUTO
from griffin.kernels.local_attention import resolve_backend
from griffin.kernels.local_attention.selection import FLASH_CAPABILITY
from griffin.kernels.rglru import rglru
from griffin.kernels.selection import HAS_TRITON
from griffin.launch.local import cores
from griffin.tools.runs.check_results import FAILED, OK, WARNING, CheckResult
from griffin.trainer.checkpoint.saving.memory import memory_left

SLURM = ("srun", "sbatch", "scancel", "scontrol", "squeue", "sinfo")
HEAD_DIM = 128  # of the models of arXiv 2402.19427
OPEN_FILES = 1024  # expected limit: rank 0 holds a connection to every rank, and a checkpoint has many files
SYNCED_FILES = 5  # small files written to time the file system
SYNC_SECONDS = 0.1  # expected for one: a checkpoint syncs thousands
TOLERANCE = 1e-4  # of float32 recurrences with values of about 1
MPI_CODE = "from mpi4py import rc; rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
GIB = 2**30


def examine_installation(folder: Path) -> list[CheckResult]:
    """Run all checks and return their results in order; a check that raises has failed."""
    checks: list[Callable[[Path], Iterator[CheckResult]]] = [
        _python,
        _torch,
        _megatron,
        _triton,
        _apex,
        _flash,
        _kernels,
        _mpi,
        _slurm,
        _machine,
        _file_system,
    ]
    results: list[CheckResult] = []
    for check in checks:
        try:
            results += check(folder)
        except Exception as error:
            results.append((FAILED, f"{check.__name__.strip('_')}: {type(error).__name__}: {error}"))
    return results


def _python(folder: Path) -> Iterator[CheckResult]:
    yield OK, f"Python: {platform.python_version()}, {sys.executable}"


def _torch(folder: Path) -> Iterator[CheckResult]:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield OK if torch.version.cuda is None else WARNING, f"torch: {torch.__version__}, {built}; no GPU is visible"
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield OK, f"torch: {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        supported = torch.cuda.get_arch_list()
        architecture = f"sm_{properties.major}{properties.minor}"
        text = f"GPU {number}: {properties.name}, {properties.total_memory / GIB:.1f} GiB, {architecture}"
        fits = any(name.startswith(f"sm_{properties.major}") for name in supported)
        yield (OK, text) if fits else (WARNING, f"{text}; this torch was built for {', '.join(supported)}")


def _megatron(folder: Path) -> Iterator[CheckResult]:
    required = [text for text in importlib.metadata.requires("griffin-megatron") or [] if "megatron-core" in text]
    version = _version("megatron-core")
    fits = not required or f"megatron-core=={version}" in required
    yield (
        (OK, f"megatron-core: {version}")
        if fits
        else (FAILED, f"megatron-core: {version or 'absent'}, must be {required[0]}")
    )


def _triton(folder: Path) -> Iterator[CheckResult]:
    if HAS_TRITON:
        yield OK, f"triton: {_version('triton')}"
    elif torch.cuda.is_available():
        yield WARNING, "triton: absent; recurrence and convolution run many times slower without it"
    else:
        yield OK, "triton: absent, needed on GPUs only"


def _apex(folder: Path) -> Iterator[CheckResult]:
    if importlib.util.find_spec("apex") is None:
        yield OK, "apex: absent; torch computes the optimizer"
    elif importlib.util.find_spec("apex.optimizers") is None:
        yield WARNING, "apex: another package than NVIDIA's, such as PyPI's; uninstall it"
    elif not torch.cuda.is_available():
        yield OK, "apex: NVIDIA's, used on GPUs only"
    elif importlib.util.find_spec("amp_C") is None:
        yield WARNING, "apex: NVIDIA's, but without its compiled extensions; torch computes the optimizer"
    else:
        yield OK, "apex: NVIDIA's, with its fused optimizer"


def _flash(folder: Path) -> Iterator[CheckResult]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = resolve_backend(AUTO, device, torch.bfloat16, HEAD_DIM)
    taken = f"train.attention = {AUTO!r} takes {backend} for heads of {HEAD_DIM}"
    if importlib.util.find_spec("flash_attn_interface") is None:
        yield OK, f"flash_attn_interface (FlashAttention 3): absent; {taken}"
    elif backend == "flash":
        yield OK, f"flash_attn_interface (FlashAttention 3): {taken}"
    elif device.type == "cuda" and torch.cuda.get_device_capability() == FLASH_CAPABILITY:
        yield WARNING, f"flash_attn_interface: cannot be imported, or has no flash_attn_varlen_func; {taken}"
    else:
        yield OK, f"flash_attn_interface (FlashAttention 3): used on NVIDIA's Hopper GPUs only; {taken}"


def _kernels(folder: Path) -> Iterator[CheckResult]:
    """Compare the recurrence's kernels of this machine, forward and backward, with the reference."""
    on_gpu = torch.cuda.is_available()
    device, backend = torch.device("cuda" if on_gpu else "cpu"), "triton" if on_gpu and HAS_TRITON else "cpu"
    begun = time.perf_counter()
    found, expected = (_recurrence(name, device) for name in (backend, "reference"))
    seconds = time.perf_counter() - begun
    error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    text = f"kernels: {backend} on {device.type}, forward and backward, differs by {error:.1e} from the reference"
    yield (OK, f"{text}, {seconds:.1f} s") if error < TOLERANCE else (FAILED, f"{text}, must be below {TOLERANCE:g}")


def _recurrence(backend: str, device: torch.device) -> list[torch.Tensor]:
    """Compute the RG-LRU's outputs and gradients for fixed random inputs."""
    generator = torch.Generator().manual_seed(0)
    x, input_gate, recurrence_gate = (
        torch.randn(100, 2, 48, generator=generator).to(device).requires_grad_() for _ in range(3)
    )
    decay = torch.randn(48, generator=generator).to(device).requires_grad_()
    y, state = rglru(x, input_gate, recurrence_gate, decay, backend=backend)
    (y.square().mean() + state.square().mean()).backward()
    gradients = [tensor.grad for tensor in (x, input_gate, recurrence_gate, decay)]
    return [y.detach(), state.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _mpi(folder: Path) -> Iterator[CheckResult]:
    if importlib.util.find_spec("mpi4py") is None:
        yield OK, "mpi4py: absent, needed under mpiexec only"
        return
    # In a separate process: an incompatible library may abort it.
    result = subprocess.run([sys.executable, "-c", MPI_CODE], capture_output=True, text=True, timeout=60)
    if result.returncode == 0 and result.stdout.strip():
        yield OK, f"mpi4py: {_version('mpi4py')} with {result.stdout.strip().splitlines()[0].strip()}"
    else:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        yield (
            WARNING,
            f"mpi4py: {_version('mpi4py')} finds no usable MPI ({reason}); needed under mpiexec only",
        )


def _slurm(folder: Path) -> Iterator[CheckResult]:
    found = [name for name in SLURM if shutil.which(name)]
    if not found:
        yield OK, "SLURM: not installed here"
    elif missing := [name for name in SLURM if name not in found]:
        yield WARNING, f"SLURM: {', '.join(found)}, but no {', '.join(missing)}"
    else:
        yield OK, f"SLURM: {', '.join(found)}"


def _machine(folder: Path) -> Iterator[CheckResult]:
    memory = min(memory_left().values(), default=0)
    yield OK, f"machine: {cores()} cores, {memory / GIB:.1f} GiB of memory free"
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"open files: limit {'none' if soft == resource.RLIM_INFINITY else soft}"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        yield WARNING, f"{text}, at least {OPEN_FILES} expected: ulimit -n"
    else:
        yield OK, text


def _file_system(folder: Path) -> Iterator[CheckResult]:
    kind, free = _mounted(folder), shutil.disk_usage(folder).free
    where = f"folder {folder.absolute()}: {kind}, {free / GIB:.1f} GiB free"
    place = folder / f".doctor-{secrets.token_hex(8)}"
    try:
        place.mkdir()
        seconds = [_sync(place / str(number)) for number in range(SYNCED_FILES)]
        (place / "0").rename(place / "renamed")
        os.replace(place / "1", place / "renamed")
        if (place / "renamed").read_bytes() != b"1" * 4096:
            yield FAILED, f"{where}; a file renamed over another does not have its content"
            return
    except OSError as error:
        yield FAILED, f"{where}; cannot be written: {error.strerror}"
        return
    finally:
        shutil.rmtree(place, ignore_errors=True)
    typical = statistics.median(seconds)
    text = f"{where}, renames work, a small file is on disk after {typical * 1e3:.2g} ms"
    if typical > SYNC_SECONDS:
        yield WARNING, f"{text}, at most {SYNC_SECONDS * 1e3:g} ms expected: checkpoints will be slow"
    else:
        yield OK, text


def _sync(path: Path) -> float:
    begun = time.perf_counter()
    with path.open("xb") as file:
        file.write(path.name.encode() * 4096)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def _mounted(folder: Path) -> str:
    """Return the type of the file system that holds `folder`; "unknown file system" if mounts cannot be read."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown file system"
    here, best = folder.resolve(), ("", "unknown file system")
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        if here.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""A rank's description of its machine: versions, environment, and the state and speed of its device."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from griffin.trainer.checkpoint.saving.memory import memory_left
from griffin.trainer.measuring.peak import best_seconds, measured_tflops
from griffin.trainer.run.folder import PACKAGES, SOURCE
from griffin.trainer.settings.sections import Config

FOLDERS = ("kernels", "parallel", "trainer", "launch", "tools")  # with the code of the package
VARIABLES = re.compile("NCCL_|TORCH_|PYTORCH_|GLOO_|CUDA_DEVICE_MAX_CONNECTIONS$|CUBLAS_|NVTE_")
SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured speed of a device."""

    tflops: float  # of matrix products in the compute dtype, 1e12 operations per second
    copy: float  # bytes read and written per second


@dataclass(frozen=True, kw_only=True)
class Device:
    """A rank's device. `faults` are reasons not to train on it; `oddities` are warnings."""

    name: str
    uuid: str  # "" for a CPU
    rates: Rates
    faults: tuple[str, ...]
    oddities: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank reports of its machine."""

    versions: dict[str, str]
    variables: dict[str, str]
    config: Config | None
    device: Device
    memory: int  # bytes available to this process
    shared_memory: int | None  # free bytes in /dev/shm; None if there is no such folder
    folder_problem: str | None  # of the run folder on this host, "" if none; None on a rank that did not check


def describe_machine(
    config: Config | None, device: torch.device, dtype: torch.dtype, folder_problem: str | None
) -> Machine:
    """Describe this rank's machine and measure its device."""
    return Machine(
        versions=versions(),
        variables={name: value for name, value in os.environ.items() if VARIABLES.match(name)},
        config=config,
        device=_describe_device(device, dtype),
        memory=min(memory_left().values(), default=0),
        shared_memory=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        folder_problem=folder_problem,
    )


def versions() -> dict[str, str]:
    """Versions of everything that affects computation or communication; "absent" for what is not installed."""
    found = {"Python": platform.python_version(), "griffin's code": code_digest()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    found["CUDA"] = torch.version.cuda or "absent"
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "absent"
    found["NVIDIA driver"] = "absent"
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        match = re.search(r"\b\d{3}\.[\d.]+\b", text)
        found["NVIDIA driver"] = match[0] if match else text.splitlines()[0]
    return found


def code_digest() -> str:
    """Digest of all source files of the package, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((SOURCE / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(SOURCE)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _describe_device(device: torch.device, dtype: torch.dtype) -> Device:
    """Describe a device. An error that it raises is a fault, so that rank 0 need not wait for this rank."""
    try:
        return describe_device(device, dtype)
    except RuntimeError as error:  # of CUDA, out of memory among them
        fault = f"it does not compute: {str(error).partition(chr(10))[0]}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return Device(name=name, uuid="", rates=Rates(tflops=0.0, copy=0.0), faults=(fault,), oddities=())


def describe_device(device: torch.device, dtype: torch.dtype) -> Device:
    """Check a device, and measure its speed. RuntimeError if it does not compute."""
    faults = [text for kind in dict.fromkeys((dtype, torch.float32)) if (text := product_fault(device, kind))]
    if device.type != "cuda":
        rates = measure_rates(device, dtype)
        return Device(name="CPU", uuid="", rates=rates, faults=tuple(faults), oddities=())
    properties = torch.cuda.get_device_properties(device)
    torch.cuda.empty_cache()
    faults += occupied(*torch.cuda.mem_get_info(device), torch.cuda.memory_reserved(device))
    rates = measure_rates(device, dtype)
    with _nvml(str(properties.uuid)) as (nvml, handle):  # right after work: an idle GPU is not throttled
        more_faults, oddities = ([], []) if nvml is None else nvml_state(nvml, handle)
    torch.cuda.empty_cache()
    return Device(
        name=properties.name,
        uuid=str(properties.uuid),
        rates=rates,
        faults=(*faults, *more_faults),
        oddities=tuple(oddities),
    )


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the speed of matrix products and copies."""
    size, rounds = (2**28, 5) if device.type == "cuda" else (2**25, 2)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = best_seconds(device, lambda: target.copy_(source), rounds)
    return Rates(tflops=measured_tflops(device, dtype), copy=2 * size / seconds)


def product_fault(device: torch.device, dtype: torch.dtype) -> str:
    """The fault of a matrix product of small integers, whose partial sums are exact in `dtype`; "" if none."""
    size = 4096 if device.type == "cuda" else 128  # not a multiple of 6: the sum over k is then -2, not 0
    k = torch.arange(size, device=device)
    rows, columns = k % 7 - 3, k % 5 + 1
    left, right = k % 3 - 1, k % 2 + 1  # their product repeats -1, 0, 1, -2, 0, 2
    result = multiply((rows[:, None] * left).to(dtype), (right[:, None] * columns).to(dtype))
    expected = (int((left * right).sum()) * rows[:, None] * columns).to(dtype)
    wrong = (result != expected).nonzero()
    if not len(wrong):
        return ""
    i, j = wrong[0].tolist()
    return (
        f"a matrix product of integers in {str(dtype).removeprefix('torch.')} is wrong in {len(wrong)} of {size}^2 "
        f"elements, first [{i}, {j}]: {float(result[i, j]):g}, must be {float(expected[i, j]):g}"
    )


def multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def occupied(free: int, total: int, own: int) -> list[str]:
    """A fault if another process uses memory of the GPU. `own` are the bytes reserved for this process's tensors.

    The process's own context and communicators take a gigabyte or two, which no call reports.
    """
    used = total - free - own
    allowed = max(total // 10, 3 * GIB)
    if used <= allowed:
        return []
    return [
        f"{used / GIB:.1f} of {total / GIB:.1f} GiB are in use already, at most {allowed / GIB:.1f} are accepted: "
        "another process runs on it"
    ]


def nvml_state(nvml: Any, handle: Any) -> tuple[list[str], list[str]]:
    """(faults, oddities) of a GPU that NVML reports. What the GPU does not support is skipped."""
    faults: list[str] = []
    oddities: list[str] = []
    with suppress(nvml.NVMLError):
        _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
        if failed:
            faults.append("a row of its memory could not be remapped: it must be replaced")
        if pending:
            oddities.append("rows of its memory wait to be remapped: it must be reset")
    with suppress(nvml.NVMLError):
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        if errors:
            oddities.append(f"{errors} uncorrected memory errors since its driver was loaded")
    with suppress(nvml.NVMLError):
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        for name, text in (
            ("HwThermalSlowdown", "heat (hardware)"),
            ("SwThermalSlowdown", "heat"),
            ("HwPowerBrakeSlowdown", "the power brake"),
            ("HwSlowdown", "the hardware"),
        ):
            if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0):
                oddities.append(f"its clock is throttled by {text}")
                break
    return faults, oddities


@contextmanager
def _nvml(uuid: str) -> Iterator[tuple[Any, Any]]:
    """(pynvml, handle of the GPU) if that package is installed and knows the GPU, else (None, None)."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or without a matching driver
        yield None, None
        return
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}".encode())
    except pynvml.NVMLError:
        handle = None
    try:
        yield (None, None) if handle is None else (pynvml, handle)
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

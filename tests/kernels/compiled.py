"""Compiles the Triton programs ahead of time for GPUs of other machines, and prints their properties as JSON.

    TRITON_INTERPRET=0 python -m tests.kernels.compiled measure --target sm_90 --only "rglru bfloat16"
    TRITON_INTERPRET=0 python -m tests.kernels.compiled keys

Launch arguments are not duplicated here: the operations' forward and backward run on meta tensors, their launches are
recorded, and Triton's JIT specialises and compiles each for a driver with the target's name and no device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from griffin.kernels.conv1d import programs as conv_programs
from griffin.kernels.conv1d import triton as conv
from griffin.kernels.gated_gelu import programs as gelu_programs
from griffin.kernels.gated_gelu import triton as gated_gelu
from griffin.kernels.linear_scan import triton as linear_scan
from griffin.kernels.recurrence import programs as scan_programs
from griffin.kernels.rglru import triton as rglru
from griffin.kernels.rglru.reference import RGLRUInputs
from griffin.kernels.rms_norm import programs as norm_programs
from griffin.kernels.rms_norm import triton as rms_norm
from griffin.kernels.rotary import programs as rotary_programs
from griffin.kernels.rotary import triton as rotary

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LANES = 32  # of a warp
SIZES = ("T", "B", "R", "L")  # upper-case arguments that are not constants of a program


@dataclass(frozen=True)
class Case:
    """A call of an operation, forward and backward."""

    operation: str
    dtype: str
    layout: str  # "time": time-major; "batch": batch-major; "half": time-major, each tensor half of a wider one
    steps: int
    batch: int
    width: int
    starts: bool = True
    option: str = ""  # of the operation: see the functions below

    def __str__(self) -> str:
        words = (self.operation, self.option, self.dtype, self.layout, f"{self.steps}x{self.batch}x{self.width}")
        return " ".join(word for word in (*words, "starts" if self.starts else "") if word)

    def tensor(self, place: int = 0) -> Tensor:
        """Return a tensor [T, B, R] on the meta device; `place` selects the half of the wider tensor."""
        steps, batch, width, dtype = self.steps, self.batch, self.width, getattr(torch, self.dtype)
        if self.layout == "half":
            return torch.empty(steps, batch, 2 * width, dtype=dtype, device="meta").chunk(2, dim=-1)[place]
        if self.layout == "batch":
            return torch.empty(batch, steps, width, dtype=dtype, device="meta").transpose(0, 1)
        return torch.empty(steps, batch, width, dtype=dtype, device="meta")

    def start_flags(self) -> Tensor | None:
        if not self.starts:
            return None
        if self.layout == "batch":
            return torch.empty(self.batch, self.steps, dtype=torch.bool, device="meta").t()
        return torch.empty(self.steps, self.batch, dtype=torch.bool, device="meta")

    def parameter(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self.width, device="meta")


def run_rglru(case: Case) -> None:
    """Options: "", "branch" (and biases), and "branch, recomputed" for a backward that computes the states again."""
    branch = case.tensor(1) if case.option else None
    x, gate = case.tensor(), case.tensor()
    bias = None if branch is None else case.parameter(2)
    inputs = RGLRUInputs(x, gate, gate, case.parameter(), branch, case.start_flags(), None, bias)
    y, last, states, firsts = rglru.forward(inputs, "recomputed" not in case.option, None)
    kept = y if branch is None else states
    grad_branch = None if branch is None else torch.empty_like(branch)
    rglru.backward(inputs, kept, firsts, torch.empty_like(y), torch.empty_like(last), grad_branch, None)


def run_linear_scan(case: Case) -> None:
    a, b, starts = case.tensor(), case.tensor(1), case.start_flags()
    h, last = linear_scan.forward(a, b, starts, None, None)
    linear_scan.backward(torch.empty_like(h), torch.empty_like(last), a, starts, None, h, None)


def run_conv(case: Case) -> None:
    """Options: "" and "window"."""
    window = replace(case, steps=3).tensor() if case.option else None
    x, weight, starts = case.tensor(), case.parameter(4), case.start_flags()
    y = conv.forward(x, weight, case.parameter(), starts, window)
    conv.backward(torch.empty_like(y), x, weight, starts, window, torch.empty_like(x))


def tokens(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def run_gated_gelu(case: Case) -> None:
    half = replace(case, layout="time").tensor()
    x, bias = torch.cat([half, half], -1), torch.empty(2 * case.width, device="meta")
    y = gated_gelu.forward(tokens(x), bias)
    gated_gelu.backward(torch.empty_like(y), tokens(x), bias)


def run_rms_norm(case: Case) -> None:
    """Options: "" and "branch"."""
    x, weight = tokens(case.tensor()), case.parameter()
    y, total, scale = rms_norm.forward(x, tokens(case.tensor()) if case.option else None, weight, 1e-6)
    rms_norm.backward(y, total, x if total is None else total, weight, scale)


HEADS = 6  # and as many dims of each as make up the width


def run_rotary(case: Case) -> None:
    steps, batch, head_dim = case.steps, case.batch, case.width // (HEADS + 2) // 4 * 4
    qkv = torch.empty(steps, batch, (HEADS + 2) * head_dim, dtype=getattr(torch, case.dtype), device="meta")
    cos = sin = torch.empty(steps, batch, head_dim // 4, device="meta")
    q, k, v = rotary.forward(qkv, cos, sin, HEADS)
    rotary.backward(q, k, v, cos, sin)


RUN: dict[str, Callable[[Case], None]] = {
    "rglru": run_rglru,
    "linear_scan": run_linear_scan,
    "conv1d": run_conv,
    "gated_gelu": run_gated_gelu,
    "rms_norm": run_rms_norm,
    "rotary": run_rotary,
}
OPTIONS = {
    "rglru": ("", "branch", "branch, recomputed"),
    "linear_scan": ("",),
    "conv1d": ("", "window"),
    "gated_gelu": ("",),
    "rms_norm": ("", "branch"),
    "rotary": ("",),
}
ALONG_TIME = ("rglru", "linear_scan", "conv1d")
# Layout and sizes. On 132 multiprocessors the first is split into chunks of time and the second is not. Of the others,
# a single sequence and batch-major tensors compile to the same code as the first. Different code comes from 64-bit
# strides (tensors beyond 2 GB), from such tensors alone (on AMD), and from channels not known to be a multiple of 16.
CHUNKED, SEQUENTIAL = ("half", 4096, 2, 1024), ("half", 4096, 8, 4096)
OTHERS = (("time", 4096, 1, 1024), ("batch", 4096, 2, 1024), ("batch", 1048576, 2, 4096), ("time", 65536, 8, 4096))
UNEVEN = ("half", 4099, 3, 1001)


def cases() -> Iterator[Case]:
    """Yield all combinations of dtype, option and starts for the usual sizes, in bfloat16 and float32.

    For other sizes and dtypes, each operation is represented by its last option with starts, which launches most.
    """
    for operation, options in OPTIONS.items():
        if operation not in ALONG_TIME:
            yield from token_cases(operation, options)
            continue
        for dtype, option, starts in itertools.product(("bfloat16", "float32"), options, (True, False)):
            yield Case(operation, dtype, *CHUNKED, starts, option)
            yield Case(operation, dtype, *SEQUENTIAL, starts, option)
        for option in options:
            yield Case(operation, "bfloat16", *UNEVEN, True, option)
        yield Case(operation, "float32", *UNEVEN, True, options[-1])
        yield Case(operation, "float16", *CHUNKED, True, options[-1])
        for shape in OTHERS:
            yield Case(operation, "bfloat16", *shape, True, options[-1])


# 14 billion parameters on 4 ranks with sequence parallelism, 1 billion on one, an odd width, and the widest norm.
TOKENS = (("time", 2048, 1, 5120), ("time", 2048, 4, 2048), ("time", 333, 3, 1001), ("time", 2048, 1, 8192))


def token_cases(operation: str, options: tuple[str, ...]) -> Iterator[Case]:
    """Yield the cases of an operation on tokens."""
    for dtype, option, shape in itertools.product(("bfloat16", "float16", "float32"), options, TOKENS):
        yield Case(operation, dtype, *shape, False, option)


class Pointer:
    """Interface of a tensor for Triton's JIT, with storage aligned to 16 bytes as allocators guarantee."""

    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()
        self._bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._bytes


class Driver:
    """A target without a device."""

    def __init__(self, name: str):
        self._name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._name]

    def get_current_device(self) -> str:
        return self._name

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    program: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # with the options of the compiler

    def compile(self) -> Any:
        """Compile the program for the active driver."""
        wrapped = {n: Pointer(value) if isinstance(value, Tensor) else value for n, value in self.arguments.items()}
        return self.program.warmup(grid=self.grid, **wrapped)

    def key(self) -> str:
        """Return the JIT's cache key for the active driver."""
        keys: list[str] = []

        def hook(*, key: str, **_: Any) -> bool:
            keys.append(key)
            return True  # do not compile

        with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
            self.compile()
        return keys[0]


def launches(case: Case) -> list[Launch]:
    """Return the launches of a call of an operation, in order."""
    found: list[Launch] = []

    def start(program: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: found.append(Launch(program, grid, arguments))

    with mock.patch.object(triton.JITFunction, "__getitem__", start):
        RUN[case.operation](case)
    return found


def kernel_names() -> list[str]:
    """Return the names of the launched programs, without device functions."""
    return [
        name
        for module in (scan_programs, conv_programs, gelu_programs, norm_programs, rotary_programs)
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.module == module.__name__ and not name.startswith("_")
    ]


def _tool(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@dataclass(frozen=True)
class Listing:
    """Instructions of a compiled program for NVIDIA GPUs, and its loops, identified by backward branches."""

    code: dict[int, str]  # by address, without predicates
    loops: list[range]

    @classmethod
    def of(cls, sass: str) -> Listing:
        code = {int(place, 16): text for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+ +)?(.*?);", sass)}
        branches = {place: re.match(r"BRA\b.*?(0x[0-9a-f]+)", text) for place, text in code.items()}
        loops = [range(int(match[1], 16), place + 1) for place, match in branches.items() if match]
        return cls(code, [loop for loop in loops if len(loop) > 1])

    def opcodes(self, span: range | None = None) -> list[str]:
        return [re.split(r"[. ]", text)[0] for place, text in self.code.items() if span is None or place in span]


def _nvidia(compiled: Any, elements: float) -> dict[str, Any]:
    usage, sass = (_tool(compiled.asm["cubin"], what) for what in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    listing = Listing.of(sass)
    # The loop over rounds of steps is by far the longest; what has none is one round.
    rounds = listing.opcodes(max(listing.loops, key=len, default=None))
    return {
        "registers": int(found[1]),
        "local": int(found[2]),
        "spills": _spills(listing.opcodes()),
        "spills_in_loops": sum(_spills(listing.opcodes(loop)) for loop in listing.loops),
        "async_copies": rounds.count("LDGSTS"),  # of a round
        "per_element": len(rounds) / elements,  # instructions for each element of a lane
    }


def _spills(opcodes: list[str]) -> int:
    return opcodes.count("STL") + opcodes.count("LDL")


def _amd(compiled: Any) -> dict[str, Any]:
    names = {
        "registers": "vgpr_count",
        "local": "private_segment_fixed_size",
        "spills": "vgpr_spill_count",
        "scalar_spills": "sgpr_spill_count",
    }
    text = compiled.asm["amdgcn"]
    return {name: int(re.search(rf"\.{field}: +(\d+)", text)[1]) for name, field in names.items()}  # type: ignore[index]


def _facts(target: str, launch: Launch) -> dict[str, Any]:
    triton.runtime.driver.set_active(Driver(target))
    begin = time.perf_counter()
    compiled = launch.compile()
    seconds = time.perf_counter() - begin
    arguments = launch.arguments
    steps = next((arguments[name] for name in ("UNROLL", "CHUNKS", "ROWS") if name in arguments), 1)
    block = arguments["BLOCK"] if "BLOCK" in arguments else arguments["QUARTER"]
    elements = steps * block / (LANES * arguments["num_warps"])
    usage = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled, elements)
    return {
        "constants": {name: value for name, value in arguments.items() if name.isupper() and name not in SIZES},
        "warps": arguments["num_warps"],
        "shared": compiled.metadata.shared,
        "seconds": round(seconds, 2),
        **usage,
    }


def measure(targets: list[str], only: list[str], share: int, shares: int) -> dict[str, Any]:
    """Return the properties of every compiled program, or of one of several shares of them."""
    chosen = {str(case): case for case in cases() if not only or any(text in str(case) for text in only)}
    by_case = {name: launches(case) for name, case in chosen.items()}
    different: dict[tuple[str, str, str], tuple[str, Launch]] = {}
    for target, (name, launched) in itertools.product(targets, by_case.items()):
        triton.runtime.driver.set_active(Driver(target))
        for launch in launched:
            different.setdefault((target, launch.program.__name__, launch.key()), (name, launch))
    return {
        "triton": triton.__version__,
        "kernels": kernel_names(),
        "launched": {name: [launch.program.__name__ for launch in launched] for name, launched in by_case.items()},
        "compiled": [
            {"target": target, "program": program, "case": name, "dtype": chosen[name].dtype}
            | {"width": chosen[name].width, **_facts(target, launch)}
            for (target, program, _), (name, launch) in list(different.items())[share::shares]
        ],
    }


LENGTHS = (2048, 2049, 4095)


def keys() -> list[dict[str, Any]]:
    """Return for each operation and layout the cache keys of its launches at several sequence lengths."""
    triton.runtime.driver.set_active(Driver("sm_90"))
    found = []
    for operation, layout, starts in itertools.product(OPTIONS, ("time", "batch", "half"), (True, False)):
        case = Case(operation, "bfloat16", layout, 0, 2, 1024, starts, OPTIONS[operation][-1])
        by_length = {steps: launches(replace(case, steps=steps)) for steps in LENGTHS}
        found.append(
            {
                "case": f"{operation} {layout}{' starts' if starts else ''}",
                "keys": {n: [(launch.program.__name__, launch.key()) for launch in ls] for n, ls in by_length.items()},
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("keys")
    command = commands.add_parser("measure")
    command.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    command.add_argument("--only", action="append", default=[], help="a part of the names of cases; default: all")
    command.add_argument("--share", type=int, nargs=2, default=(0, 1), help="number of this process, and of how many")
    arguments = parser.parse_args()
    if arguments.command == "keys":
        print(json.dumps(keys()))
    else:
        print(json.dumps(measure(arguments.target or list(TARGETS), arguments.only, *arguments.share)))


if __name__ == "__main__":
    main()

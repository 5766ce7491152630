"""Compiled Triton programs for GPUs of other machines: spills, registers, shared memory, asynchronous copies.

`tests.kernels.compiled` compiles every configuration that the selector can pick, in separate processes, because
Triton's programs are interpreted in this one. All of them take minutes; a quick test covers the cache keys.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from griffin.kernels.recurrence.plan import TARGET_PROGRAMS

ROOT = Path(__file__).parents[2]
PROCESSES = 2
TOKEN_PROGRAMS = ("gated_gelu_", "rms_norm_", "rotary_")  # of operations on tokens
WIDTH_KNOWN = 16  # the number of channels must be a multiple of it for rows to be known to be aligned

Entry = dict[str, Any]


def _needs_tools() -> None:
    spec = find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package triton")
    folder = Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin")
    for tool in ("ptxas", "cuobjdump"):
        if not (folder / tool).is_file():
            pytest.skip(f"needs {tool}, which this build of triton does not come with")


def _run(cache: Path, timeout: float, *arguments: str) -> Any:
    _needs_tools()
    # Compile, do not interpret, with Triton's own tools and without the cache of an earlier run.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.compiled", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of all processes, each of which compiles a share of the same launches."""
    cache = tmp_path_factory.mktemp("triton")

    def share(number: int) -> Any:
        return _run(cache, 1200, "measure", "--share", str(number), str(PROCESSES))

    with ThreadPoolExecutor(PROCESSES) as pool:
        found = list(pool.map(share, range(PROCESSES)))
    return found[0] | {"compiled": [entry for one in found for entry in one["compiled"]]}


def _is_aligned(entry: Entry) -> bool:
    return entry["width"] % WIDTH_KNOWN == 0


def _walks(entry: Entry) -> bool:
    return not entry["program"].startswith(TOKEN_PROGRAMS)


def _is_half(entry: Entry) -> bool:
    return entry["dtype"] != "float32"


def _is_nvidia(entry: Entry) -> bool:
    return entry["target"].startswith("sm_")


def _name(entry: Entry, *facts: str) -> str:
    flags = " ".join(name for name, value in entry["constants"].items() if value is True)
    what = ", ".join(f"{fact} {entry[fact]}" for fact in facts)
    return f"{entry['target']} {entry['program']} {flags} ({entry['case']}): {what}"


def _assert_none(entries: Iterable[Entry], *facts: str) -> None:
    assert not [_name(entry, *facts) for entry in entries]


@pytest.mark.slow
def test_all_programs_and_both_paths_are_compiled(measured):
    compiled = measured["compiled"]
    assert {entry["program"] for entry in compiled} == set(measured["kernels"])
    launched = measured["launched"].values()
    assert any(
        {"chunk_summaries", "chunk_carries", "scan_forward", "scan_backward"} <= set(names) for names in launched
    )
    reverse = [entry["constants"]["REVERSE"] for entry in compiled if entry["program"] == "chunk_carries"]
    assert set(reverse) == {True, False}
    assert any(names == ["scan_forward", "scan_backward"] for names in launched)
    assert {entry["target"] for entry in compiled} == {"sm_80", "sm_90", "gfx942"}
    assert {entry["dtype"] for entry in compiled} == {"bfloat16", "float16", "float32"}
    assert any(not _is_aligned(entry) for entry in compiled)
    # Every combination of a program's options, in each dtype used for training.
    for dtype in ("bfloat16", "float32"):
        flags = {
            (entry["program"], *sorted(name for name, value in entry["constants"].items() if value is True))
            for entry in compiled
            if entry["dtype"] == dtype and entry["program"].startswith("scan_")
        }
        # With and without starts: no gates, gates, gates and a branch; forward, also states with a branch, and biases
        # without a branch, where states are recomputed.
        assert len(flags) == 2 * 5 + 2 * 3


@pytest.mark.slow
def test_nothing_is_spilled(measured):
    """No value of a step is spilled to memory.

    If rows are not known to be aligned, a few values may be spilled before the loop: twice 4 bytes in several thousand
    steps. On AMD, scalar registers (mostly addresses) may be spilled to lanes of up to three vector registers.
    """
    compiled = measured["compiled"]
    _assert_none((e for e in compiled if e["spills"] and (_is_aligned(e) or not _is_nvidia(e))), "spills")
    _assert_none((e for e in compiled if e.get("spills_in_loops")), "spills_in_loops")
    _assert_none((e for e in compiled if e["local"]), "local")
    _assert_none((e for e in compiled if e.get("scalar_spills", 0) > 3 * 64), "scalar_spills")


def _warps(entry: Entry) -> int:
    """Return the number of warps that must fit the registers of a multiprocessor, relative to the chunked path's.

    Forward twice as many; backward, which needs more registers, 1.5 times as many. Only as many in the backward pass if
    rows are not known to be aligned, or on AMD in float32, which is for comparisons. Programs on tokens have several
    warps, of which as many must fit.
    """
    if not _walks(entry):
        return max(TARGET_PROGRAMS * 3 // 2, entry["warps"]) if _is_aligned(entry) else TARGET_PROGRAMS
    if "backward" not in entry["program"]:
        return 2 * TARGET_PROGRAMS
    is_last_resort = not _is_aligned(entry) or not (_is_half(entry) or _is_nvidia(entry))
    return TARGET_PROGRAMS if is_last_resort else TARGET_PROGRAMS * 3 // 2


@pytest.mark.slow
def test_registers_leave_room_for_enough_programs(measured):
    def room(entry: Entry) -> int:
        if _is_nvidia(entry):  # 65,536 registers, allocated to warps of 32 lanes in units of 8 per lane
            return 65536 // (-(-entry["registers"] // 8) * 8 * 32)
        return 4 * (512 // (-(-entry["registers"] // 8) * 8))  # four units of 512 for each lane

    _assert_none((e for e in measured["compiled"] if room(e) < _warps(e)), "registers")


KILOBYTES = {"sm_80": 164, "sm_90": 228, "gfx942": 64}  # of shared memory per multiprocessor


@pytest.mark.slow
def test_shared_memory_leaves_room_for_enough_programs(measured):
    """In 16 bits twice as many as on the chunked path, on an A100 1.5 times as many; in float32 half of that."""

    def is_over(entry: Entry) -> bool:
        reserved = 1024 if _is_nvidia(entry) else 0  # for each program
        programs = KILOBYTES[entry["target"]] * 1024 // (entry["shared"] + reserved or 1)
        wanted = 2 * TARGET_PROGRAMS if entry["target"] != "sm_80" and _walks(entry) else TARGET_PROGRAMS * 3 // 2
        return programs * entry["warps"] < wanted // (1 if _is_half(entry) else 2)

    _assert_none((e for e in measured["compiled"] if is_over(e)), "shared")


def _rows(program: str, constants: dict[str, Any]) -> int:
    """Return the number of tensors [T, B, R] that a step reads."""
    gated, branch = constants.get("GATED", False), constants.get("HAS_BRANCH", False)
    if program == "chunk_summaries":
        return 2 + branch if constants["REVERSE"] else 2 + gated
    return {
        "scan_forward": 2 + gated + branch,  # term and gate
        "scan_backward": 3 + 2 * gated + branch,  # gate, states and gradient; gates also read term and input gate
        "conv_forward": 1,
        "conv_backward": 2,
    }[program]


@pytest.mark.slow
def test_rows_are_copied_asynchronously(measured):
    """Loads of several rounds in flight hide the memory latency, which one warp cannot."""
    seen = set()
    for entry in measured["compiled"]:
        program, constants = entry["program"], entry["constants"]
        if not _is_nvidia(entry) or not _is_aligned(entry) or program == "chunk_carries" or not _walks(entry):
            continue
        seen.add((program, _is_half(entry)))
        assert entry["async_copies"] >= constants["UNROLL"] * _rows(program, constants), _name(entry, "async_copies")
    programs = {name for name in measured["kernels"] if not name.startswith(TOKEN_PROGRAMS)} - {"chunk_carries"}
    assert seen == {(program, is_half) for program in programs for is_half in (True, False)}


# An H200 copies 4.3 TB/s, with 132 multiprocessors of 4 schedulers at 1.7 GHz. While memory moves the 8 bytes per
# element of the forward pass and the 16 of the backward pass (12 and 20 with a branch), a scheduler issues 53 and 107
# (80 and 133) instructions per 32 elements. Some of these must be left for waiting.
BUDGET = {  # by program, and whether there is a branch
    ("scan_forward", False): 50,
    ("scan_backward", False): 85,
    ("scan_forward", True): 70,
    ("scan_backward", True): 115,
}


@pytest.mark.slow
def test_arithmetic_takes_less_time_than_memory(measured):
    seen = set()
    for entry in measured["compiled"]:
        kind = (entry["program"], entry["constants"].get("HAS_BRANCH"))
        if kind in BUDGET and (entry["target"], entry["dtype"]) == ("sm_90", "bfloat16") and _is_aligned(entry):
            seen.add(kind)
            assert 1 < entry["per_element"] <= BUDGET[kind], _name(entry, "per_element")
    assert seen == set(BUDGET)


@pytest.mark.slow
def test_other_lengths_trigger_no_recompilation(tmp_path):
    for found in _run(tmp_path, 120, "keys"):
        first, *others = found["keys"].values()
        assert first
        assert all(keys == first for keys in others), found["case"]

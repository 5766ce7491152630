"""`griffin doctor`: one line per check, and exit code 1 if one failed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from torch.distributed import TCPStore

from griffin.launch import local
from griffin.parallel.world.ranks import Ranks
from griffin.tools.cli import main
from griffin.tools.commands import doctor
from griffin.tools.commands.doctor import FAILED, OK, WARNING
from griffin.tools.runs import installation as doctor_installation
from griffin.tools.runs.installation import examine_installation
from tests.small_runs import wait_for, write_config

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-P", "-m", "griffin.tools.cli", "doctor"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_ID", "SLURM_NTASKS", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


def run_doctor(*words: str | Path) -> tuple[int, list[tuple[str, str]]]:
    """Run the command; return its exit code, and (state, text) of each line."""
    command = [*COMMAND, *map(str, words)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.stderr == "", result.stderr
    return result.returncode, [(line[:8].strip(), line[9:]) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_two_ranks_of_a_healthy_machine(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "runs").mkdir()
    code, lines = run_doctor("--ranks", "2", "--dir", tmp_path / "runs", config, "--train.dtype", "bfloat16")
    assert code == 0, lines
    assert {state for state, _ in lines} <= {OK, WARNING}
    found = dict(text.split(":", 1) for _, text in lines)
    assert {"ranks", "versions", "devices", "links within a host", "all-reduce", "Python", "kernels"} <= found.keys()
    assert "a checkpoint takes 0.7 MiB" in found["run folder"]
    assert "differs by" in found["kernels"]
    assert list((tmp_path / "runs").iterdir()) == []


def fake_run_local(results: list[tuple[str, str]], code: int) -> Callable[..., int]:
    """Return a stand-in for `run_local` whose ranks have these results."""

    def run_local(target: Any, ranks: int, args: tuple[Any, ...], *, preload: tuple[str, ...]) -> int:
        if results:
            args[2].write_text(json.dumps(results))
        return code

    return run_local


@pytest.mark.parametrize(
    ("results", "code", "expected"),
    [
        ([(OK, "links: 3"), (WARNING, "slow link")], 0, 0),
        ([(OK, "links: 3"), (FAILED, "all-reduce: wrong")], 0, 1),
        ([], 137, 1),
    ],
)
def test_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    results: list[tuple[str, str]],
    code: int,
    expected: int,
) -> None:
    monkeypatch.setattr(local, "run_local", fake_run_local(results, code))
    monkeypatch.setattr(doctor_installation, "examine_installation", lambda folder: [(OK, "torch: 2")])
    assert main(["doctor", "--dir", str(tmp_path), "--ranks", "3"]) == expected
    lines = capsys.readouterr().out.splitlines()
    for state, text in results:
        assert f"{state:<8} {text}" in lines
    assert ("FAILED   ranks: 3 on this machine ended with exit code 137" in lines) == (code == 137)
    assert lines[-1] == "ok       torch: 2"


def test_one_rank_of_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = Ranks(rank=1, world_size=2, local_rank=1, address="a", port=1, source="slurm", store_served=False)
    monkeypatch.setattr(doctor, "discover", lambda: ranks)
    monkeypatch.setattr(doctor, "check_rank", lambda *args: [(WARNING, "rank 0 on n: GPU is slow")])
    assert main(["doctor", "--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""  # rank 0 says it
    assert main(["doctor", "--ranks", "2"]) == 2
    assert "this process is one of 2 ranks that slurm started" in capsys.readouterr().err


# A rank whose preflight has three seconds; rank 1 runs code of the test before it.
RANK = """
import os, signal, sys
from griffin.trainer.preflight import check, machine
check.preflight.__kwdefaults__["limit"] = 3.0
versions = machine.versions
def fail():
    {fault}
    return versions() | {{"torch": "1.0"}}
if os.environ["RANK"] == "1":
    machine.versions = fail
from griffin.tools.cli import main
sys.exit(main(["doctor", "--dir", sys.argv[1]]))
"""


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("pass", "FAILED   torch differs: 1.0 on rank 1 on "),
        ("os.kill(0, signal.SIGSTOP)", "FAILED   rank 1 on "),
    ],
    ids=["differs", "hangs"],
)
@pytest.mark.slow
def test_a_failure_is_told_before_a_launcher_ends_all_ranks(tmp_path: Path, fault: str, expected: str) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-P", "-c", RANK.format(fault=fault), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env=ENVIRONMENT | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        wait_for(lambda: any(process.poll() is not None for process in ranks), 60)
        codes = [process.poll() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = ranks[0].communicate()[0]
    ranks[1].communicate()
    assert set(codes) <= {None, 1}
    assert expected in said
    assert list(tmp_path.iterdir()) == []


def test_a_local_rank_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rank that knows of a failure reports it and ends all ranks."""
    left: list[int] = []
    monkeypatch.setattr(doctor, "leave", left.append)
    monkeypatch.setattr(doctor, "check_rank", lambda *args: [(FAILED, "rank 0 was not done")])
    ranks = Ranks(rank=1, world_size=2, local_rank=1, address="a", port=1, source="local", store_served=True)
    doctor.check_local_rank(ranks, None, tmp_path, tmp_path / "found")
    assert left == [1]
    assert json.loads((tmp_path / "found").read_text()) == [[FAILED, "rank 0 was not done"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--dir", "absent"], "--dir absent: must be a folder that exists"),
        (["--train.steps", "3"], "--train.steps: settings need a CONFIG.toml"),
        (["absent.toml"], "absent.toml: no such config file"),
    ],
)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def result_of(folder: Path, check: str) -> tuple[str, str]:
    (result,) = [(state, text) for state, text in examine_installation(folder) if text.startswith(check)]
    return result


def test_kernels_that_compute_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rglru = doctor_installation.rglru

    def wrong(x: Tensor, *gates: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return rglru(x * (1.01 if backend == "cpu" else 1), *gates, backend=backend)

    monkeypatch.setattr(doctor_installation, "rglru", wrong)
    assert result_of(tmp_path, "kernels")[0] == FAILED


def test_another_package_of_the_name_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    packages = {"apex": SimpleNamespace(), "apex.optimizers": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: packages[name] if name in packages else find(name))
    state, text = result_of(tmp_path, "apex")
    assert (state, "another package than NVIDIA's" in text) == (WARNING, True)


@pytest.mark.parametrize(("spec", "expected"), [(None, "absent"), (SimpleNamespace(), "used on NVIDIA's Hopper GPUs")])
def test_flash_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: SimpleNamespace | None, expected: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: spec if n == "flash_attn_interface" else find(n))
    state, text = result_of(tmp_path, "flash_attn_interface")
    assert (state, text.startswith(f"flash_attn_interface (FlashAttention 3): {expected}")) == (OK, True)
    assert text.endswith("; train.attention = 'auto' takes sdpa for heads of 128")


def test_a_version_of_megatron_core_that_is_not_the_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.15.0" if name == "megatron-core" else version(name)
    )
    assert result_of(tmp_path, "megatron-core") == (FAILED, "megatron-core: 0.15.0, must be megatron-core==0.16.1")


def test_a_slow_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_installation, "SYNC_SECONDS", 0.0)
    state, text = result_of(tmp_path, "folder")
    assert (state, "checkpoints will be slow" in text) == (WARNING, True)
    assert list(tmp_path.iterdir()) == []


def test_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    assert result_of(tmp_path, "open files")[0] == WARNING


def test_mpi_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mpi4py")
    monkeypatch.setattr(doctor_installation, "MPI_CODE", "raise RuntimeError('cannot load MPI library')")
    state, text = result_of(tmp_path, "mpi4py")
    assert (state, "RuntimeError: cannot load MPI library" in text) == (WARNING, True)

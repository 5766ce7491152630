from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from griffin.launch.discovery import discover, failure_text, first_host, slurm_tasks_unused
from griffin.parallel.world.ranks import Ranks, serve_store
from griffin.trainer.checkpoint.saving.exchange import Listener

ROOT = Path(__file__).parents[2]
LAUNCHERS = re.compile(r"RANK|WORLD_SIZE|GROUP_|LOCAL_RANK|MASTER_|TORCHELASTIC_|SLURM_|OMPI_|PMIX?_|MPI_LOCAL")

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
# As seen in a step of two tasks on each of two nodes of SLURM 22.05.
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[01-08]",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets a launcher's variables, and only those."""

    def use(variables: dict[str, str]) -> None:
        import os

        for name in list(os.environ):
            if LAUNCHERS.match(name):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


def without(variables: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in variables.items() if key != name}


def test_a_lost_store_is_reported_in_one_line() -> None:
    error = dist.DistNetworkError("Failed to recv\nException raised from recvBytes\nframe #0: ...")
    assert failure_text(error) == "DistNetworkError: lost the rendezvous store: Failed to recv\n"


def test_no_launcher(environment) -> None:
    environment({})
    assert discover() is None


def test_torchrun(environment) -> None:
    environment(TORCHRUN)
    assert discover() == Ranks(
        rank=3, world_size=4, local_rank=1, address="host-a", port=29500, source="torchrun", store_served=True
    )


def test_torchrun_inside_of_slurm_and_without_an_agent_store(environment) -> None:
    environment(without(TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE") | SLURM)
    ranks = discover()
    assert ranks is not None
    assert ranks.source == "torchrun"
    assert not ranks.store_served


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_torchrun_variable_missing(environment, name: str) -> None:
    environment(without(TORCHRUN, name))
    with pytest.raises(ValueError, match=f"^{name}: missing from the environment, .* torchrun"):
        discover()


def test_variable_that_is_not_a_number(environment) -> None:
    environment(TORCHRUN | {"WORLD_SIZE": "four"})
    with pytest.raises(ValueError, match=re.escape("WORLD_SIZE = 'four' (torchrun): must be an integer")):
        discover()


def test_rank_outside_of_the_world(environment) -> None:
    environment(TORCHRUN | {"RANK": "4"})
    with pytest.raises(ValueError, match=re.escape("rank = 4 (torchrun): must lie in 0 ... 3")):
        discover()


def test_slurm(environment) -> None:
    environment(SLURM)
    ranks = discover()
    assert ranks is not None
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 1)
    assert (ranks.address, ranks.source, ranks.store_served) == ("gpu07", "slurm", False)
    assert 1024 < ranks.port < 32768  # below Linux's ephemeral ports


def test_slurm_steps_of_one_job_use_different_ports(environment) -> None:
    ports = set()
    for step in ("0", "1", "2"):
        environment(SLURM | {"SLURM_STEP_ID": step})
        ranks = discover()
        assert ranks is not None
        ports.add(ranks.port)
    assert len(ports) == 3


def test_slurm_port_depends_on_the_key(environment) -> None:
    ports = set()
    for key in ("", "0" * 64, "1" * 64):
        environment(SLURM | {"GRIFFIN_RUN_KEY": key})
        ranks = discover()
        assert ranks is not None
        assert ranks.key == key.encode()
        assert key == "" or key not in repr(ranks)
        ports.add(ranks.port)
    assert len(ports) == 3
    environment(SLURM | {"GRIFFIN_RUN_KEY": "guess"})
    with pytest.raises(ValueError, match=r"^GRIFFIN_RUN_KEY: must be at least 32 hexadecimal digits"):
        discover()


def test_slurm_on_one_node_uses_loopback(environment) -> None:
    environment(SLURM | {"SLURM_STEP_NUM_NODES": "1"})
    ranks = discover()
    assert ranks is not None
    assert ranks.is_on_one_machine


def test_slurm_with_a_stated_rendezvous(environment) -> None:
    environment(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    ranks = discover()
    assert ranks is not None
    assert (ranks.address, ranks.port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1"])
def test_slurm_with_a_loopback_address_on_several_nodes(environment, address: str) -> None:
    environment(SLURM | {"MASTER_ADDR": address})
    with pytest.raises(ValueError, match=f"MASTER_ADDR = '{address}': must be reachable from all 2 nodes"):
        discover()


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "PMI_SIZE"])
def test_slurm_and_another_launcher_count_different_worlds(environment, name: str) -> None:
    environment(SLURM | {name: "1"})
    with pytest.raises(ValueError, match=f"{name} = 1 but SLURM_NTASKS = 4: the launchers disagree"):
        discover()


def test_one_torchrun_per_task_of_slurm(environment) -> None:
    """Two nodes, each with a torchrun of two ranks."""
    nodes = SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    environment(TORCHRUN | nodes | {"GROUP_WORLD_SIZE": "2"})
    ranks = discover()
    assert ranks is not None
    assert (ranks.rank, ranks.world_size) == (3, 4)
    environment(TORCHRUN | nodes | {"GROUP_WORLD_SIZE": "1"})  # --standalone in each of them
    with pytest.raises(ValueError, match="SLURM_NTASKS = 2 but GROUP_WORLD_SIZE = 1: the launchers disagree"):
        discover()
    environment(TORCHRUN | SLURM | {"RANK": "0", "WORLD_SIZE": "1"})  # by a script's own hand
    with pytest.raises(ValueError, match="SLURM_NTASKS = 4 but WORLD_SIZE = 1: the launchers disagree"):
        discover()


def test_batch_script_without_srun(environment) -> None:
    environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"})
    assert discover() is None
    assert slurm_tasks_unused() == 8
    environment(SLURM)
    assert slurm_tasks_unused() == 0


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4]", "n1"),
        ("gpu-[007,010-012],login", "gpu-007"),
        ("rack[2-3]node[01-16]", "rack2node01"),
        ("n[5,7]-ib,m1", "n5-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_mpi4py_with_another_mpi_than_mpiexec(environment, monkeypatch: pytest.MonkeyPatch) -> None:
    environment({"PMI_RANK": "1", "PMI_SIZE": "4"})
    alone = types.SimpleNamespace(COMM_WORLD=types.SimpleNamespace(size=1, rank=0))
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=alone))
    with pytest.raises(ValueError, match="PMI_SIZE = 4 but mpi4py sees a world of 1"):
        discover()


# As seen in a rank of `mpiexec -n 4` in a job of two tasks on each of two nodes: the step is that of its two daemons.
DAEMONS = {
    "MPI_LOCALNRANKS": "2",
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}


@pytest.mark.parametrize(
    ("variables", "world", "on_node", "message"),
    [
        (DAEMONS, 4, 2, None),
        (without(DAEMONS, "SLURM_NTASKS_PER_NODE"), 6, 3, None),  # the job's number of tasks is not known
        (DAEMONS, 6, 3, "SLURM_JOB_NUM_NODES x SLURM_NTASKS_PER_NODE = 4 but mpi4py sees a world of 6"),
        (DAEMONS, 2, 2, "SLURM_JOB_NUM_NODES x SLURM_NTASKS_PER_NODE = 4 but mpi4py sees a world of 2"),
        (
            without(DAEMONS, "SLURM_NTASKS_PER_NODE"),
            2,
            2,
            "SLURM_STEP_NUM_NODES = 2 but mpi4py sees a world of 2 on one",
        ),
        ({"MPI_LOCALNRANKS": "4", "SLURM_NTASKS": "4"}, 4, 4, None),
        ({"MPI_LOCALNRANKS": "2", "SLURM_NTASKS": "4"}, 2, 2, "SLURM_NTASKS = 4 but mpi4py sees a world of 2"),
        ({"MPI_LOCALNRANKS": "4"}, 4, 4, None),
    ],
)
def test_mpiexec_inside_of_a_job(
    environment,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    world: int,
    on_node: int,
    message: str | None,
) -> None:
    environment({name: value for name, value in variables.items() if not name.startswith("PMI_")})

    class World:
        size, rank = world, 1

        def Split_type(self, kind: object) -> types.SimpleNamespace:  # noqa: N802
            return types.SimpleNamespace(size=on_node, rank=0)

        def Bcast(self, word: bytearray, root: int) -> None:  # noqa: N802
            word[:] = b'["n1", 7, "6b6579"]'.ljust(len(word))

    mpi = types.SimpleNamespace(COMM_WORLD=World(), COMM_TYPE_SHARED=0)
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi))
    if message is None:
        ranks = discover()
        assert ranks is not None
        assert (ranks.source, ranks.world_size) == ("mpi", world)
        assert (ranks.address, ranks.port, ranks.key) == ("n1", 7, b"key")
    else:
        with pytest.raises(ValueError, match=message):
            discover()


def test_mpiexec_without_mpi4py(environment, monkeypatch: pytest.MonkeyPatch) -> None:
    environment({"OMPI_COMM_WORLD_SIZE": "4"})
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"mpi4py cannot be used .*griffin-megatron\[mpi\]"):
        discover()


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "127.0.1.1", "::1"])
def test_any_loopback_address_is_reached(address: str) -> None:
    try:
        store = serve_store(address, 0, None)
    except OSError as error:
        assert address == "::1"
        pytest.skip(f"no IPv6 here: {error}")
    patience = timedelta(seconds=10)
    dist.TCPStore(address, store.port, is_master=False, wait_for_workers=False, timeout=patience).set("key", "value")
    assert store.get("key") == b"value"

    socket.create_connection((address, Listener(address, b"k" * 32, 10.0).port), timeout=10).close()


def test_rank_0_serves_the_store_where_no_launcher_does() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    ranks = Ranks(
        rank=0, world_size=1, local_rank=0, address="127.0.0.1", port=port, source="slurm", store_served=False
    )
    store = ranks.store(timedelta(seconds=20))
    store.set("key", "value")
    assert store.get("key") == b"value"


ADD_UP = """
from griffin.launch.discovery import discover
import torch, torch.distributed as dist
ranks = discover()
dist.init_process_group("gloo", store=ranks.store(), rank=ranks.rank, world_size=ranks.world_size)
total = torch.tensor([ranks.rank + 1])
dist.all_reduce(total)
dist.destroy_process_group()
print(f"{ranks.source} {ranks.rank}/{ranks.world_size} {total.item()}\\n", end="", flush=True)
"""


def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *command: str) -> list[str]:
    script = tmp_path / "add_up.py"
    script.write_text(ADD_UP)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return sorted(line for line in result.stdout.splitlines() if line)


@pytest.mark.slow
def test_real_torchrun(environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment({})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    assert launch(tmp_path, monkeypatch, *command) == ["torchrun 0/2 3", "torchrun 1/2 3"]


@pytest.mark.slow
def test_real_mpiexec(environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment({})
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("no mpiexec or no mpi4py")
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True).stdout
    flags = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version or "OpenRTE" in version else []
    assert launch(tmp_path, monkeypatch, mpiexec, *flags, "-n", "2", sys.executable) == ["mpi 0/2 3", "mpi 1/2 3"]

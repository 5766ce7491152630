"""Discovery of this process's rank under torchrun, srun or mpiexec."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

from griffin.parallel.world.messages import pack, unpack
from griffin.parallel.world.ranks import LOOPBACK, Ranks, RunError, is_loopback, serve_store

# Ports for jobs whose ranks cannot agree on one otherwise: below Linux's ephemeral range.
FIRST_PORT, PORTS = 20_000, 10_000
# The run's key in hexadecimal digits: the job script generates it, and srun passes it to the ranks only.
KEY = "GRIFFIN_RUN_KEY"
MESSAGE_BYTES = 512  # of the broadcast with the store's address over MPI; host names have at most 253


def discover() -> Ranks | None:
    """Return this process's rank as set by its launcher, or None without a launcher.

    Call it once per process, and end failed ranks with `leave`: under mpiexec, this initialises MPI. Raises ValueError
    if the launcher's environment variables contradict one another.
    """
    environment = os.environ
    if "RANK" in environment:
        return _torchrun(environment)
    # Before SLURM: mpiexec inside a SLURM job starts its daemons with srun, whose variables reach the ranks.
    if "OMPI_COMM_WORLD_SIZE" in environment or "MPI_LOCALNRANKS" in environment:
        return _mpi(environment)
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        return _slurm(environment)
    if "PMI_RANK" in environment or "PMIX_RANK" in environment:
        return _mpi(environment)
    return None


def failure_text(error: BaseException) -> str:
    """Return what a failed rank prints: the message of a self-explanatory error, else the traceback.

    A lost store is a consequence of another failure: the process that serves it has ended.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and isinstance(error, distributed.DistNetworkError):
        message = str(error).partition("\n")[0]  # C++ frames follow
        return f"{type(error).__name__}: lost the rendezvous store: {message}\n"
    is_self_explanatory = isinstance(error, RunError) or (isinstance(error, OSError) and error.filename is not None)
    return f"{type(error).__name__}: {error}\n" if is_self_explanatory else "".join(traceback.format_exception(error))


def leave(code: int) -> NoReturn:
    """Exit at once, so that the launcher ends the other ranks.

    A normal exit would wait for them in destructors and MPI's finalisation.
    """
    with suppress(OSError):  # a full disk, or a closed pipe
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def slurm_tasks_unused() -> int:
    """Return the number of tasks of a SLURM allocation in which this process was started without srun; else 0."""
    started_by_srun = "SLURM_STEP_ID" in os.environ
    return 0 if started_by_srun else int(os.environ.get("SLURM_NTASKS", 0))


def _integer(environment: Mapping[str, str], name: str, source: str) -> int:
    text = environment.get(name)
    if text is None:
        raise ValueError(f"{name}: missing from the environment, which otherwise looks like that of {source}")
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError(f"{name} = {text!r} ({source}): must be an integer")
    return int(text)


def _key(environment: Mapping[str, str]) -> bytes:
    text = environment.get(KEY, "")
    if not re.fullmatch(r"([0-9a-f]{32,})?", text):
        raise ValueError(f"{KEY}: must be at least 32 hexadecimal digits, in lower case, that others cannot know")
    return text.encode()


def _check_agreement(name: str, value: int, environment: Mapping[str, str], *others: str) -> None:
    """Raise ValueError if the launchers involved disagree about the world size."""
    for other in others:
        if other in environment and _integer(environment, other, name) != value:
            raise ValueError(
                f"{other} = {environment[other]} but {name} = {value}: the launchers disagree about the number of "
                "ranks; start all of them with one launcher"
            )


def _check_slurm_agreement(world_size: int, on_one_node: bool, environment: Mapping[str, str]) -> None:
    """Raise ValueError if mpiexec's world is not that of the surrounding SLURM job."""
    tasks, name = int(environment.get("SLURM_NTASKS") or 1), "SLURM_NTASKS"
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or 1)
    if "SLURM_STEP_ID" in environment and tasks == nodes:
        # Probably mpiexec's own step of one daemon per node, whose variables hide the job's number of tasks.
        if "SLURM_NTASKS_PER_NODE" in environment:
            per_node = _integer(environment, "SLURM_NTASKS_PER_NODE", "SLURM")
            tasks = per_node * int(environment.get("SLURM_JOB_NUM_NODES") or 1)
            name = "SLURM_JOB_NUM_NODES x SLURM_NTASKS_PER_NODE"
        elif on_one_node and nodes > 1:
            raise ValueError(
                f"SLURM_STEP_NUM_NODES = {nodes} but mpi4py sees a world of {world_size} on one of them: one mpiexec "
                "must start all ranks"
            )
        else:
            return
    if tasks > 1 and tasks != world_size:
        raise ValueError(
            f"{name} = {tasks} but mpi4py sees a world of {world_size}: start all tasks of the job by one `mpiexec "
            f"-n {tasks}`, or by srun alone"
        )


def _torchrun(environment: Mapping[str, str]) -> Ranks:
    address = environment.get("MASTER_ADDR")
    if not address:
        raise ValueError("MASTER_ADDR: missing from the environment, which otherwise looks like that of torchrun")
    if "SLURM_STEP_ID" in environment and "SLURM_NTASKS" in environment:
        # One torchrun per srun task, each with a group of ranks. Without torchrun, a script set the variables.
        groups = "GROUP_WORLD_SIZE" if "GROUP_WORLD_SIZE" in environment else "WORLD_SIZE"
        _check_agreement(groups, _integer(environment, groups, "torchrun"), environment, "SLURM_NTASKS")
    return Ranks(
        rank=_integer(environment, "RANK", "torchrun"),
        world_size=_integer(environment, "WORLD_SIZE", "torchrun"),
        local_rank=_integer(environment, "LOCAL_RANK", "torchrun"),
        address=address,
        port=_integer(environment, "MASTER_PORT", "torchrun"),
        source="torchrun",
        store_served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        key=_key(environment),
    )


def _slurm(environment: Mapping[str, str]) -> Ranks:
    world_size = _integer(environment, "SLURM_NTASKS", "srun")
    _check_agreement("SLURM_NTASKS", world_size, environment, "SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "PMI_SIZE")
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not hosts:
        raise ValueError("SLURM_STEP_NODELIST: missing from the environment, which otherwise looks like that of srun")
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    is_alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    address = environment.get("MASTER_ADDR") or (LOOPBACK if is_alone else first_host(hosts))
    if nodes > 1 and is_loopback(address):
        raise ValueError(f"MASTER_ADDR = {address!r}: must be reachable from all {nodes} nodes, or left out")
    if "MASTER_PORT" in environment:
        port = _integer(environment, "MASTER_PORT", "srun")
    else:  # jobs that share a node have different ids, as have the steps of a job
        job, step = (_integer(environment, name, "srun") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        # With a key, the port cannot be guessed from the job's number.
        secret = int.from_bytes(hashlib.sha256(b"port" + key).digest()) if (key := _key(environment)) else 0
        port = FIRST_PORT + (secret + job * 17 + step) % PORTS
    return Ranks(
        rank=_integer(environment, "SLURM_PROCID", "srun"),
        world_size=world_size,
        local_rank=_integer(environment, "SLURM_LOCALID", "srun"),
        address=address,
        port=port,
        source="slurm",
        store_served=False,
        key=_key(environment),
    )


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: "n01" of "n[01-03,7],m2", "a" of "a,b"."""
    host = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if host is None:
        raise ValueError(f"SLURM_STEP_NODELIST = {nodelist!r}: must be a list of hosts")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", host.group())


def mpi_world(environment: Mapping[str, str]) -> Any:
    """Return mpi4py's communicator of all ranks that mpiexec started.

    Raises ValueError if mpi4py cannot be used, or disagrees with mpiexec about the number of ranks.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError without an MPI library
        raise ValueError(
            f"started by mpiexec, but mpi4py cannot be used ({str(error).splitlines()[0]}): install "
            "griffin-megatron[mpi] and the MPI that mpiexec belongs to"
        ) from None
    world: Any = MPI.COMM_WORLD
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in environment and _integer(environment, name, "mpiexec") != world.size:
            raise ValueError(
                f"{name} = {environment[name]} but mpi4py sees a world of {world.size}: mpi4py uses another MPI than "
                "the mpiexec that started it"
            )
    return world


def _mpi(environment: Mapping[str, str]) -> Ranks:
    world = mpi_world(environment)
    from mpi4py import MPI

    node: Any = world.Split_type(MPI.COMM_TYPE_SHARED)
    _check_slurm_agreement(world.size, node.size == world.size, environment)
    server, message = None, bytearray(MESSAGE_BYTES)
    if world.rank == 0:
        host = LOOPBACK if node.size == world.size else socket.gethostname()
        address = environment.get("MASTER_ADDR") or host
        server = serve_store(address, 0, world.size)
        message[:] = pack((address, server.port, secrets.token_bytes(32))).ljust(MESSAGE_BYTES)
    world.Bcast(message, root=0)  # mpi4py's lower-case bcast would unpickle
    address, port, key = unpack(bytes(message), tuple[str, int, bytes])
    return Ranks(
        rank=world.rank,
        world_size=world.size,
        local_rank=node.rank,
        address=address,
        port=port,
        source="mpi",
        store_served=True,
        key=key,
        server=server,
    )

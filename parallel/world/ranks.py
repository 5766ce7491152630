"""Rank of a process in the world, and the key-value store for rendezvous."""

from __future__ import annotations

import ipaddress
import resource
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"

# Exit code of a training run that was asked to stop: its work is saved, and a restart resumes it.
STOPPED = 85
# Exit code of a rank of a training run that hung: a restart resumes from the last checkpoint.
HUNG = 86


class RunError(RuntimeError):
    """Ends a run with a self-explanatory message, which is printed without a traceback."""


class OtherRankError(RuntimeError):
    """Another rank failed and reports the reason."""


def allow_connections() -> None:
    """Raise the limit of open files, for a store with two connections per rank.

    The usual limit of 1024 would suffice for about 500 ranks.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def is_loopback(address: str) -> bool:
    """Return whether an address or host name is only reachable from this machine."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def listen_on_loopback(address: str, port: int, backlog: int) -> socket.socket:
    """Return a socket that listens only at a loopback address, such as 127.0.1.1 or ::1."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    host = LOOPBACK if address == "localhost" else address
    return socket.create_server((host, port), family=family, backlog=backlog)


def serve_store(
    address: str, port: int, world_size: int | None, timeout: timedelta = timedelta(minutes=5), *, waits: bool = False
) -> TCPStore:
    """Serve the store at a port (0: any free port). With `waits`, return once all ranks have connected.

    A TCPStore listens on all interfaces by default. For a loopback address this one listens only there.
    """
    from torch.distributed import TCPStore

    allow_connections()
    listening = None
    if is_loopback(address):
        server = listen_on_loopback(address, port, backlog=4096)
        port, listening = server.getsockname()[1], server.detach()  # the store takes ownership
    return TCPStore(address, port, world_size, True, timeout, waits, master_listen_fd=listening)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Rank of this process, and the address of the rendezvous store. Created by launchers, read by the trainer."""

    rank: int
    world_size: int
    local_rank: int  # rank among the processes of this machine; index of its GPU
    address: str
    port: int
    source: str  # "local", "torchrun", "slurm" or "mpi"
    store_served: bool  # by the launcher; otherwise `store` serves it on rank 0
    # Secret of the run's ranks that signs what they put into the store; b"" if the launcher sets none.
    key: bytes = field(default=b"", repr=False, compare=False)
    server: object = field(default=None, repr=False, compare=False)  # keeps the store's server alive in its process

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank = {self.rank} ({self.source}): must lie in 0 ... {self.world_size - 1}")

    @property
    def is_on_one_machine(self) -> bool:
        """Whether the rendezvous is at a loopback address, so all ranks run on this machine."""
        return is_loopback(self.address)

    def host(self) -> str:
        """Return the address at which other ranks reach this machine: the one it reaches the rendezvous from."""
        family, kind, protocol, _, address = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing, only selects the interface
            own = str(probe.getsockname()[0])
        # On the machine of the rendezvous it may be a loopback address, useless to the others.
        return self.address if ipaddress.ip_address(own).is_loopback else own

    def store(self, timeout: timedelta = timedelta(minutes=5)) -> TCPStore:
        """Return a connection for `torch.distributed.init_process_group(store=...)`.

        Waits up to `timeout` for the server, or on a serving rank 0 for all other ranks, then raises DistError.
        """
        from torch.distributed import TCPStore

        if self.rank == 0 and not self.store_served:
            return serve_store(self.address, self.port, self.world_size, timeout, waits=True)
        return TCPStore(self.address, self.port, self.world_size, False, timeout)

    def another_connection(self, timeout: timedelta) -> TCPStore:
        """Return a further connection for another thread; calls on one connection are serialised."""
        from torch.distributed import TCPStore

        return TCPStore(self.address, self.port, self.world_size, False, timeout, wait_for_workers=False)

    def server_name(self) -> str:
        """Describe the store's server, for messages."""
        server = "the launcher" if self.store_served else "rank 0"
        return f"the rendezvous store that {server} serves at {self.address}:{self.port}"

"""One process's place in the world, and the key-value store through which the processes find each other."""

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

# Exit code of a training that was asked to stop: what it has done is saved, and starting it again goes on.
STOPPED = 85
# Exit code of a rank of a training that hung: starting it again goes on from the last checkpoint.
HUNG = 86


class RunError(RuntimeError):
    """Ends a run for a reason that its message tells in full: it is printed without a traceback."""


class OtherRankError(RuntimeError):
    """Another rank failed, and tells why itself."""


def allow_connections() -> None:
    """Let this process serve a store to as many ranks as the system lets it, each with two connections: the customary
    limit of 1024 open files would do for some 500."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def is_loopback(address: str) -> bool:
    """Whether an address or a host's name is that of this machine alone."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def listen_on_loopback(address: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens at a loopback address, such as 127.0.1.1 or ::1, and nowhere else."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    host = LOOPBACK if address == "localhost" else address
    return socket.create_server((host, port), family=family, backlog=backlog)


def serve_store(
    address: str, port: int, world_size: int | None, timeout: timedelta = timedelta(minutes=5), *, waits: bool = False
) -> TCPStore:
    """Serve the store at a port, 0 for a free one; where `waits`, once all ranks have come.

    By itself a store listens on every interface of the machine: at a loopback address it does on that one alone.
    """
    from torch.distributed import TCPStore

    allow_connections()
    listening = None
    if is_loopback(address):
        server = listen_on_loopback(address, port, backlog=4096)
        port, listening = server.getsockname()[1], server.detach()  # the store closes it
    return TCPStore(address, port, world_size, True, timeout, waits, master_listen_fd=listening)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Rank of this process, and where the rendezvous store listens. Launchers make it; the trainer only reads it."""

    rank: int
    world_size: int
    local_rank: int  # rank among the processes of this machine: the number of its GPU
    address: str
    port: int
    source: str  # "local", "torchrun", "slurm" or "mpi"
    store_served: bool  # a launcher serves the store already; otherwise rank 0 does, from `store` on
    # Known to the run's ranks alone, by which they sign what they put into the store; b"" where a launcher gives none.
    key: bytes = field(default=b"", repr=False, compare=False)
    server: object = field(default=None, repr=False, compare=False)  # keeps a store's server alive in its process

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank = {self.rank} ({self.source}): must lie in 0 ... {self.world_size - 1}")

    @property
    def is_on_one_machine(self) -> bool:
        """Whether the ranks find each other at a loopback address: nobody else need reach them."""
        return is_loopback(self.address)

    def host(self) -> str:
        """The address at which the other ranks reach this machine: that from which it reaches the rendezvous."""
        family, kind, protocol, _, address = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: it only chooses the interface
            own = str(probe.getsockname()[0])
        # On the machine of the rendezvous it may be the loopback's, which says nothing to others.
        return self.address if ipaddress.ip_address(own).is_loopback else own

    def store(self, timeout: timedelta = timedelta(minutes=5)) -> TCPStore:
        """This process's connection for `torch.distributed.init_process_group(store=...)`.

        Waits for the server, and rank 0 for all the others, up to `timeout`; raises torch's DistError after that.
        """
        from torch.distributed import TCPStore

        if self.rank == 0 and not self.store_served:
            return serve_store(self.address, self.port, self.world_size, timeout, waits=True)
        return TCPStore(self.address, self.port, self.world_size, False, timeout)

    def another_connection(self, timeout: timedelta) -> TCPStore:
        """A further connection to a store that is served already, for another thread: the calls of one take turns."""
        from torch.distributed import TCPStore

        return TCPStore(self.address, self.port, self.world_size, False, timeout, wait_for_workers=False)

    def server_name(self) -> str:
        """Who serves the store, for people."""
        server = "the launcher" if self.store_served else "rank 0"
        return f"the rendezvous store that {server} serves at {self.address}:{self.port}"

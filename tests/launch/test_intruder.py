"""An attacker on this machine connects to every port of a run: nothing that it sends is executed."""

from __future__ import annotations

import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from griffin.parallel.world.ranks import HUNG, LOOPBACK, STOPPED
from tests.small_runs import saved_steps, write_config
from tests.strangers import Bomb, sockets_of

ROOT = Path(__file__).parents[2]
LISTENS = "0A"
LOOPBACKS = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
SECONDS = 240.0  # that a run may take on a busy machine
STEPS, INTERVAL = 12, 3


@dataclass(kw_only=True)
class Intruder:
    """Watches the processes of a run, and attacks each port once as soon as it listens."""

    process: int
    bomb: bytes  # makes a file where it is unpickled
    ports: dict[int, str] = field(default_factory=dict)  # seen so far: the address, in hexadecimal digits
    owners: dict[int, str] = field(default_factory=dict)  # command line of the first process that held it
    silent: list[socket.socket] = field(default_factory=list)  # connections that are held and say nothing

    def look(self) -> None:
        for process in descendants(self.process):
            for address, port in listening_at(process):
                if port not in self.ports:
                    self.ports[port] = address
                    self.owners[port] = command_of(process)
                    self.attack(port)

    def attack(self, port: int) -> None:
        length, size = struct.pack(">Q", len(self.bomb)), struct.pack("<Q", len(self.bomb))
        for data in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 4096,
            bytes(4096),
            struct.pack(">Q", 2**63) + b"x",
            self.bomb,
            length + self.bomb,
            size + self.bomb,
            size[:4] + self.bomb,
            b"\x80" + length + length + self.bomb,
        ):
            with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=2) as stranger:
                stranger.sendall(data)
        with suppress(OSError):
            self.silent.append(socket.create_connection((LOOPBACK, port), timeout=2))


def descendants(process: int) -> list[int]:
    found = [process]
    for parent in found:
        with suppress(OSError):  # a process or thread has ended
            for file in Path(f"/proc/{parent}/task").glob("*/children"):
                found.extend(map(int, file.read_text(encoding="ascii").split()))
    return found


def listening_at(process: int) -> set[tuple[str, int]]:
    """Return the TCP addresses, in hexadecimal digits, and ports at which a process listens."""
    try:
        inodes = sockets_of(process)
    except OSError:  # it has ended
        return set()
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.add((address, int(port, 16)))
    return found


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def started(folder: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    """Run `griffin train` with two ranks, data loader processes and a checkpoint every few steps."""
    settings = {
        "train.steps": steps,
        "checkpoint.interval": INTERVAL,
        "data.workers": 1,
        "train.eval_interval": 0,
        "health.hang_seconds": 60,
    }
    command = [sys.executable, "-m", "griffin.tools.cli", "train", str(write_config(folder))]
    command += [
        "--ranks",
        "2",
        "--run-dir",
        str(folder / "run"),
        *(f"--{name}={is_}" for name, is_ in settings.items()),
    ]
    with (folder / "output").open("w") as output, (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, text=True, cwd=ROOT)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGINT)  # the second one kills the ranks
                process.wait(60)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that has not run by the end of the test, and is then shown to work."""
    planted = tmp_path / "planted"
    made = pickle.dumps(Bomb(planted))
    yield made
    assert not planted.exists()
    pickle.loads(made)
    assert planted.exists()


@pytest.mark.slow
def test_a_run_ends_well_whatever_comes_to_its_ports(tmp_path: Path, bomb: bytes) -> None:
    with started(tmp_path, STEPS) as process:
        intruder = Intruder(process=process.pid, bomb=bomb)
        deadline = time.monotonic() + SECONDS
        while process.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "output").read_text()
            intruder.look()
            time.sleep(0.02)
    for stranger in intruder.silent:
        stranger.close()
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert saved_steps(tmp_path / "run")[-1] == STEPS
    assert set(intruder.ports.values()) <= LOOPBACKS, intruder
    # The store's, gloo's of both ranks, and both saving processes'.
    assert len(intruder.ports) >= 5, intruder
    assert sum("saving" in command or "checkpoint" in command for command in intruder.owners.values()) >= 2, intruder


def store_port(process: int) -> int | None:
    """Return the port of the launcher, which serves the store."""
    return next((port for _, port in listening_at(process)), None)


def is_first(key: str) -> bool:
    return key == "griffin/backend"


def is_ours(key: str) -> bool:
    return key.startswith("griffin/")


KEYS: dict[str, Callable[[str], bool]] = {
    "all": lambda key: True,
    "ours after the first": lambda key: is_ours(key) and not is_first(key),
    "gloo's": lambda key: not is_ours(key),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("since", "which"),
    [("the start", "all"), ("the start", "ours after the first"), ("the start", "gloo's"), ("a checkpoint", "all")],
)
def test_pickles_under_the_keys_of_the_store_are_not_run(tmp_path: Path, bomb: bytes, since: str, which: str) -> None:
    """Values in the store are replaced repeatedly: the run continues, or ends with a message and no traceback."""
    replaced: set[str] = set()
    with started(tmp_path, 100_000) as process:
        deadline = time.monotonic() + SECONDS
        checkpoints = tmp_path / "run" / "checkpoints"
        while (port := store_port(process.pid)) is None or (
            since != "the start" and not list(checkpoints.glob("step-????????"))
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        limit = timedelta(seconds=10)
        stranger = dist.TCPStore(LOOPBACK, port, is_master=False, wait_for_workers=False, timeout=limit)
        with suppress(dist.DistError):  # the run ends
            ends = time.monotonic() + (20 if since == "the start" else 3)
            while process.poll() is None and time.monotonic() < ends:
                for key in filter(KEYS[which], stranger.list_keys()):
                    stranger.set(key, bomb)  # type: ignore[arg-type]
                    replaced.add(key)
                time.sleep(0.002)
        del stranger
        with suppress(subprocess.TimeoutExpired):  # one that ends by itself
            process.wait(5)
        if process.poll() is None:
            process.terminate()
        process.wait(SECONDS)
    errors = (tmp_path / "errors").read_text()
    assert replaced, errors
    assert process.returncode in (0, 1, STOPPED, HUNG), errors
    assert "Traceback" not in errors
    print(process.returncode, len(replaced), errors)  # where the test fails

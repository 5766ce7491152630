"""One run at a time writes a run folder: a lock file that names its owner, and how a lock left behind is recognised."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import re
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from griffin.parallel.world.messages import ForgedError, unpack
from griffin.trainer.files import SETTINGS_BYTES, is_integer, open_regular

NAME = "lock"
HEARTBEAT_SECONDS = 10.0  # between two touches of the file by its owner
PATIENCE_SECONDS = 60.0  # an owner of another machine that touches its file for so long not once is gone
POLL_SECONDS = 0.2
TOKEN = re.compile("[0-9a-f]{32}")
MOST_PID = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What a lock file says, as JSON, of the process that made it."""

    token: str  # drawn for this lock alone
    user: str
    host: str
    machine: str | None  # boot and process namespace: within one, process ids can be compared
    pid: int
    process_started: int | None  # clock ticks since boot: tells a process from a later one of the same id
    job: str | None  # SLURM's cluster and job id
    job_restarts: int  # how often SLURM has requeued it
    started: str  # local time
    command: str

    @classmethod
    def current(cls) -> Owner:
        environment = os.environ
        job = environment.get("SLURM_JOB_ID")
        return cls(
            token=secrets.token_hex(16),
            user=_user(),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_started=_process_started(os.getpid()),
            job=f"{environment.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else None,
            job_restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            command=shlex.join(sys.argv),
        )

    @classmethod
    def parse(cls, text: bytes) -> Owner | None:
        """None where `text` is not what an owner wrote, or not all of it yet."""
        try:
            owner = unpack(text, cls)
        except ForgedError:
            return None
        fits = TOKEN.fullmatch(owner.token) and is_integer(owner.pid, 1, MOST_PID)
        return owner if fits else None

    def __str__(self) -> str:
        job = f", job {self.job.strip('/')}" if self.job else ""
        return f"{self.user} on {self.host} (process {self.pid}{job}, since {self.started}: {self.command})"

    def has_ended(self, me: Owner) -> bool | None:
        """Whether this owner's process has ended, as the process of `me` can tell; None where it cannot."""
        if self.job is not None and self.job == me.job and self.job_restarts < me.job_restarts:
            return True  # SLURM ends a job before it starts it again
        if self.machine is None or self.machine != me.machine:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it runs, as another user
            pass
        running = _process_started(self.pid)
        return None if running is None else running != self.process_started


class RunLock:
    """The lock that this process holds. A context manager; a thread of its own shows other machines that it lives."""

    path: Path
    token: str

    def __init__(self, path: Path, token: str, file: int, heartbeat: float) -> None:
        """Of a lock file that was made already and is open as descriptor `file`: use `acquire`."""
        self.path, self.token = path, token
        self._file = file
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._touch, args=(heartbeat,), name="run lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        run_dir: Path,
        say: Callable[[str], None] = print,
        *,
        patience: float = PATIENCE_SECONDS,
        heartbeat: float = HEARTBEAT_SECONDS,
    ) -> RunLock:
        """Lock `run_dir`, which is made where it is missing. ValueError naming the owner where a living one holds it.

        A lock is taken over at once where its process is known to have ended: it was one of this machine, or of an
        earlier start of this SLURM job. Of another machine's, the file is watched for up to `patience` seconds of this
        machine's clock: an owner touches it every `heartbeat` seconds.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path, me = run_dir / NAME, Owner.current()
        while True:
            file = _create(path, me)
            if file is None:
                file = _take_over(path, me, say, patience)
            if file is not None:
                return cls(path, me.token, file, heartbeat)

    def release(self) -> None:
        """Remove the file if it is still this lock's. A file that cannot be removed is recognised as stale later."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        os.close(self._file)
        if holds(self.path, self.token):
            with suppress(OSError):
                self.path.unlink()

    def _touch(self, heartbeat: float) -> None:
        # By the descriptor: where another run has taken the lock over, its file is not touched.
        while not self._released.wait(heartbeat):
            with suppress(OSError):
                os.utime(self._file)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holds(path: Path, token: str) -> bool:
    """Whether the lock file `path` stands and is that of `token`."""
    file = _read(path)
    return file is not None and file.identity == token


def is_taken_over(path: Path, token: str) -> bool:
    """Whether the lock file `path` stands and is another's than that of `token`."""
    file = _read(path)
    return file is not None and file.identity != token


def refuse_if_held(run_dir: Path) -> None:
    """ValueError where a living process of this machine holds the lock of `run_dir`. Waits for nothing."""
    file = _read(run_dir / NAME)
    if file is not None and file.owner is not None and file.owner.has_ended(Owner.current()) is False:
        raise file.refusal()


@dataclass(frozen=True)
class _File:
    """A lock file as it was read."""

    path: Path
    identity: str  # the owner's token, or the inode of a file that says none
    owner: Owner | None
    touched: int  # ns, of its file system's clock

    def refusal(self) -> ValueError:
        owner = self.owner or "a run that it does not name"
        return ValueError(
            f"{self.path}: another run writes this folder: {owner}; end that one first, or choose another --run-dir"
        )


def _take_over(path: Path, me: Owner, say: Callable[[str], None], patience: float) -> int | None:
    """A descriptor of the lock file, now mine, once its owner has ended; None where its owner changed meanwhile.

    A newcomer claims the stale lock by making the file lock.after-TOKEN, TOKEN being the stale one's: of several
    newcomers one succeeds. While it holds the claim nobody else replaces that lock, so once it has seen that the lock
    is still the stale one, it can move its claim into the lock's place. A claim whose maker died in between is itself
    claimed like a lock. A claim is removed by its maker, or with the lock at the head of its chain.
    """
    chain = _chain(path)
    if not chain or not _wait_for_end(chain[-1], me, say, patience):
        return None
    claim = _claim(path, chain[-1])
    file = _create(claim, me)
    if file is None:
        return None
    try:
        expected = [earlier.identity for earlier in chain] + [me.token]
        if [standing.identity for standing in _chain(path)] == expected:
            os.replace(claim, path)
            for earlier in chain[1:]:
                earlier.path.unlink(missing_ok=True)
            return file
    except BaseException:
        claim.unlink(missing_ok=True)
        os.close(file)
        raise
    claim.unlink(missing_ok=True)
    os.close(file)
    return None


def _chain(path: Path) -> list[_File]:
    """The lock, the claim on it, the claim on that claim, ...; the last one's owner decides. Empty without a lock."""
    chain = []
    file = _read(path)
    while file is not None:
        chain.append(file)
        file = _read(_claim(path, file))
    return chain


def _claim(path: Path, file: _File) -> Path:
    return path.with_name(f"{path.name}.after-{file.identity}")


def _wait_for_end(file: _File, me: Owner, say: Callable[[str], None], patience: float) -> bool:
    """True once the owner of `file` has ended, False if the file is another's by then; ValueError if the owner lives.

    A file without an owner, which may just be being written, is watched like one of another machine.
    """
    owner = file.owner or "a run that it does not name"
    deadline = time.monotonic() + patience
    announced = False
    while True:
        has_ended = None if file.owner is None else file.owner.has_ended(me)
        if has_ended:
            say(f"{file.path}: left behind by {owner}, which has ended")
            return True
        if has_ended is False:
            raise file.refusal()
        if time.monotonic() >= deadline:
            say(f"{file.path}: left behind by {owner}, without a sign of life for {patience:g} s")
            return True
        time.sleep(POLL_SECONDS)
        now = _read(file.path)
        if now is None or now.identity != file.identity:
            return False
        if now.touched != file.touched:
            raise file.refusal()
        if not announced:
            say(f"{file.path}: held by {owner}; waiting up to {patience:g} s for a sign of life")
            announced = True


def _create(path: Path, owner: Owner) -> int | None:
    """A descriptor of the new file `path`, which names `owner`; None where one stands already."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.write((json.dumps(dataclasses.asdict(owner), indent=2) + "\n").encode())
        os.fsync(file)
    except BaseException:  # a full disk, an interrupt
        path.unlink(missing_ok=True)
        os.close(file)
        raise
    return file


def _read(path: Path) -> _File | None:
    """None where there is no such file."""
    text = b""
    try:
        try:
            with open_regular(path) as file:  # network file systems ask the server on opening, not on a mere stat
                status = os.fstat(file.fileno())
                text = file.read(SETTINGS_BYTES)  # an owner writes less
        except FileNotFoundError:
            return None
        except OSError:  # unreadable for this user, no regular file, or replaced on the server meanwhile
            status = path.stat()
    except OSError:
        return None
    owner = Owner.parse(text)
    return _File(path, owner.token if owner else f"inode-{status.st_ino}", owner, status.st_mtime_ns)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in this container
        return str(os.getuid())


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; 0 for one that has ended and is not waited for yet, None for one
    that cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])

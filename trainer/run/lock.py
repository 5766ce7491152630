"""The lock of a run folder, which one run at a time writes, and the detection of stale locks."""

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
HEARTBEAT_SECONDS = 10.0  # the owner touches the file this often
PATIENCE_SECONDS = 60.0  # an owner on another machine that has not touched the file for so long is gone
POLL_SECONDS = 0.2
TOKEN = re.compile("[0-9a-f]{32}")
MOST_PID = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The owner of a lock, as its file describes it in JSON."""

    token: str  # random, unique to this lock
    user: str
    host: str
    machine: str | None  # boot id and pid namespace: process ids can be compared within one
    pid: int
    process_started: int | None  # clock ticks since boot: distinguishes it from a later process with the same id
    job: str | None  # SLURM's cluster and job id
    job_restarts: int  # how many times SLURM has requeued the job
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
        """The owner that a lock file names; None if `text` is anything else, or not complete yet."""
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
        """Whether this owner's process has ended; None if the process of `me` cannot tell."""
        if self.job is not None and self.job == me.job and self.job_restarts < me.job_restarts:
            return True  # SLURM ends a job before it restarts it
        if self.machine is None or self.machine != me.machine:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it is running, as another user
            pass
        running = _process_started(self.pid)
        return None if running is None else running != self.process_started


class RunLock:
    """A lock that this process holds. A context manager. A thread touches the file as a sign of life."""

    path: Path
    token: str

    def __init__(self, path: Path, token: str, file: int, heartbeat: float) -> None:
        """For a lock file that exists and is open as descriptor `file`. Use `acquire` instead."""
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
        """Lock `run_dir`, creating it if needed. ValueError naming the owner if a running process holds the lock.

        A stale lock is taken over at once if its process is known to have ended: a process of this machine, or of an
        earlier start of this SLURM job. The lock of another machine is watched for up to `patience` seconds by this
        machine's clock; a running owner touches it every `heartbeat` seconds.
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
        """Remove the file if it is still this lock's. A file that cannot be removed will be recognised as stale."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        os.close(self._file)
        if holds(self.path, self.token):
            with suppress(OSError):
                self.path.unlink()

    def _touch(self, heartbeat: float) -> None:
        # By descriptor: if another run has taken over the lock, its file is not touched.
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
    """Whether the lock file `path` exists and has this `token`."""
    file = _read(path)
    return file is not None and file.identity == token


def is_taken_over(path: Path, token: str) -> bool:
    """Whether the lock file `path` exists and has another token than `token`."""
    file = _read(path)
    return file is not None and file.identity != token


def refuse_if_held(run_dir: Path) -> None:
    """Raise ValueError if a running process of this machine holds the lock of `run_dir`. Does not wait."""
    file = _read(run_dir / NAME)
    if file is not None and file.owner is not None and file.owner.has_ended(Owner.current()) is False:
        raise file.refusal()


@dataclass(frozen=True)
class _File:
    """The state of a lock file when it was read."""

    path: Path
    identity: str  # the owner's token, or the inode if the file has none
    owner: Owner | None
    touched: int  # modification time in ns, by the clock of its file system

    def refusal(self) -> ValueError:
        owner = self.owner or "a run that it does not name"
        return ValueError(
            f"{self.path}: another run writes this folder: {owner}; end that one first, or choose another --run-dir"
        )


def _take_over(path: Path, me: Owner, say: Callable[[str], None], patience: float) -> int | None:
    """Wait until the owner has ended, and take over the lock. Returns its descriptor; None if the owner has changed.

    A newcomer claims a stale lock by creating the file lock.after-TOKEN, where TOKEN is that of the stale lock. Only
    one of several newcomers succeeds. Nobody else replaces that lock while the claim exists. So once the newcomer has
    seen that the lock is still the stale one, it can rename its claim to the lock. If the newcomer dies in between, its
    claim is itself claimed like a lock. A claim is removed by its creator, or with the lock at the head of its chain.
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
    """The lock, the claim on it, the claim on that claim, and so on; [] without a lock. The last one's owner counts."""
    chain = []
    file = _read(path)
    while file is not None:
        chain.append(file)
        file = _read(_claim(path, file))
    return chain


def _claim(path: Path, file: _File) -> Path:
    return path.with_name(f"{path.name}.after-{file.identity}")


def _wait_for_end(file: _File, me: Owner, say: Callable[[str], None], patience: float) -> bool:
    """Wait for a sign of life of the owner of `file`, and raise ValueError if it is running.

    Returns True once it has ended, and False if the file has another owner by then. A file that names no owner, as it
    may be being written, is watched like that of another machine.
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
    """Create the file `path`, which names `owner`. Returns its descriptor; None if the file exists already."""
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
    """Read a lock file; None if there is no such file."""
    text = b""
    try:
        try:
            with open_regular(path) as file:  # opening asks the server of a network file system, stat may not
                status = os.fstat(file.fileno())
                text = file.read(SETTINGS_BYTES)  # an owner writes less
        except FileNotFoundError:
            return None
        except OSError:  # not readable by this user, no regular file, or replaced on the server meanwhile
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
    """Start of a process in clock ticks since boot; 0 for a zombie, None if it cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])

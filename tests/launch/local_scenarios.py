"""All scenarios of test_local.py in one fresh process: python local_scenarios.py FOLDER writes FOLDER/results.json.

In a process of their own, as `run_local` is in practice: pytest's has a fork server for other tests already.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from griffin.launch.local import run_local
from griffin.parallel.world.ranks import HUNG, STOPPED, Ranks

FOREVER = 600.0


def say_ready(ranks: Ranks, folder: Path) -> None:
    (folder / f"ready-{ranks.rank}").write_text(str(os.getpid()))


def wait_for(folder: Path, count: int) -> list[int]:
    """Return the process ids of the ranks, once `count` of them are ready."""
    while True:
        texts = [path.read_text() for path in folder.glob("ready-*")]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.01)


def meet(ranks: Ranks, folder: Path) -> None:
    say_ready(ranks, folder)
    store = ranks.store()
    store.set(f"from {ranks.rank}", str(ranks.local_rank))
    heard = [store.get(f"from {rank}").decode() for rank in range(ranks.world_size)]
    threads = os.environ["OMP_NUM_THREADS"]
    (folder / f"heard-{ranks.rank}").write_text(json.dumps([*heard, ranks.source, threads, sys.argv[1]]))


def fail_or_hang(ranks: Ranks, folder: Path) -> None:
    say_ready(ranks, folder)
    if ranks.rank == 1:
        wait_for(folder, ranks.world_size)
        raise RuntimeError("the oven is cold")
    time.sleep(FOREVER)


def follow_a_crash(ranks: Ranks, folder: Path) -> None:
    """Rank 2 is killed, and rank 0 fails as if it had lost its connection to rank 2."""
    say_ready(ranks, folder)
    wait_for(folder, ranks.world_size)
    pid = int((folder / "ready-2").read_text())
    if ranks.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    while ranks.rank == 0:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            raise ConnectionError("connection closed by peer") from None
    time.sleep(FOREVER)


def exit_with(ranks: Ranks, folder: Path, code: int) -> None:
    say_ready(ranks, folder)
    sys.exit(code)


def hang(ranks: Ranks, folder: Path) -> None:
    say_ready(ranks, folder)
    time.sleep(FOREVER)


def ignore_signals(ranks: Ranks, folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hang(ranks, folder)


def finish_on_usr1(ranks: Ranks, folder: Path) -> None:
    signal.signal(signal.SIGUSR1, lambda number, _: (folder / f"saved-{ranks.rank}").write_text(str(number)))
    say_ready(ranks, folder)
    while not (folder / f"saved-{ranks.rank}").exists():
        time.sleep(0.01)


def save_on_term(ranks: Ranks, folder: Path) -> None:
    """Save on SIGTERM and exit with 85; rank 1 takes longer, and must not be killed because rank 0 is done."""

    def save(number: int, frame: object) -> None:
        time.sleep(ranks.rank)
        (folder / f"saved-{ranks.rank}").write_text("")
        sys.exit(STOPPED)

    signal.signal(signal.SIGTERM, save)
    hang(ranks, folder)


def save_on_usr1(ranks: Ranks, folder: Path) -> None:
    """Stop some time after SIGUSR1; rank 1 takes longer, and returns normally."""
    saved: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: saved.append(number))
    say_ready(ranks, folder)
    while not saved:
        time.sleep(0.01)
    time.sleep(ranks.rank)
    (folder / f"saved-{ranks.rank}").write_text("")
    sys.exit(STOPPED * (1 - ranks.rank))


def save_or_fail(ranks: Ranks, folder: Path) -> None:
    """On SIGTERM rank 0 exits as if it had saved, rank 1 fails, and rank 2 waits for it forever."""

    def save(number: int, frame: object) -> None:
        if ranks.rank == 1:
            time.sleep(0.5)
            raise RuntimeError("the disk is full")
        if ranks.rank == 0:
            sys.exit(STOPPED)

    signal.signal(signal.SIGTERM, save)
    say_ready(ranks, folder)
    deadline = time.monotonic() + FOREVER
    while time.monotonic() < deadline:
        time.sleep(0.1)


def leave_a_stopped_rank(ranks: Ranks, folder: Path) -> None:
    """Rank 0 is suspended, and the others exit with HUNG."""
    (folder / f"pid-{ranks.rank}").write_text(str(os.getpid()))
    if ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    sys.exit(HUNG)


def start_child_and_fail(ranks: Ranks, folder: Path) -> None:
    child = subprocess.Popen(["sleep", str(FOREVER)])
    (folder / f"child-{ranks.rank}").write_text(str(child.pid))
    fail_or_hang(ranks, folder)


def not_reached(ranks: Ranks, folder: Path, argument: object) -> None:
    raise AssertionError


def run(
    folder: Path,
    target: Callable[..., None],
    ranks: int,
    *signals: int,
    args: tuple = (),
    grace: float = 60.0,
    save: float = 60.0,
) -> dict[str, Any]:
    """Return the results of one run_local; `signals` are sent to its process, 0.5 s apart, once all ranks are ready."""
    folder.mkdir()

    def send() -> None:
        wait_for(folder, ranks)
        for count, number in enumerate(signals):
            time.sleep(0.5 * min(count, 1))
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send, daemon=True)
    if signals:
        sender.start()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    stderr = io.StringIO()
    started = time.monotonic()
    with contextlib.redirect_stderr(stderr):
        try:
            code: int | str = run_local(
                target, ranks, (folder, *args), preload=("torch",), grace_seconds=grace, save_seconds=save
            )
        except Exception as error:
            code = repr(error)
    seconds = time.monotonic() - started
    if signals:
        sender.join()
    restored = handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    return {"code": code, "seconds": seconds, "stderr": stderr.getvalue(), "handlers_restored": restored}


def main(folder: Path) -> None:
    results = {
        "meet": run(folder / "meet", meet, 3),
        "raise": run(folder / "raise", fail_or_hang, 3),
        "crash": run(folder / "crash", follow_a_crash, 3),
        "exit": run(folder / "exit", exit_with, 2, args=(7,)),
        "exit_0": run(folder / "exit_0", exit_with, 2, args=(0,)),
        "term": run(folder / "term", hang, 2, signal.SIGTERM),
        "interrupt": run(folder / "interrupt", hang, 2, signal.SIGINT),
        "usr1": run(folder / "usr1", finish_on_usr1, 2, signal.SIGUSR1),
        "save": run(folder / "save", save_on_term, 2, signal.SIGTERM, grace=0.1),
        "save_usr1": run(folder / "save_usr1", save_on_usr1, 2, signal.SIGUSR1, grace=0.1, save=0.1),
        "save_or_fail": run(folder / "save_or_fail", save_or_fail, 3, signal.SIGTERM, grace=1.0),
        "grace": run(folder / "grace", ignore_signals, 2, signal.SIGINT, grace=1.0),
        "save_late": run(folder / "save_late", ignore_signals, 2, signal.SIGTERM, save=1.0),
        "int_int": run(folder / "int_int", ignore_signals, 2, signal.SIGINT, signal.SIGINT),
        "term_term": run(folder / "term_term", ignore_signals, 2, signal.SIGTERM, signal.SIGTERM),
        "term_int": run(folder / "term_int", ignore_signals, 2, signal.SIGTERM, signal.SIGINT),
        "hung": run(folder / "hung", leave_a_stopped_rank, 3),
        "child": run(folder / "child", start_child_and_fail, 2),
        "pickle": run(folder / "pickle", not_reached, 2, args=(threading.Lock(),)),
    }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    if len(sys.argv) == 3:  # a parent that will be killed
        run_local(hang, 2, (Path(sys.argv[1]),))
    else:
        main(Path(sys.argv[1]))

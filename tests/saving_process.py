"""What tests do inside a saving process: slow it down, or kill it at a file operation."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

# Python's own operations on files.
_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}


def code(controls: Path) -> str:
    """What a saving process executes, instead of `saver.PROGRAM`, to be controlled by files in the folder `controls`.

    In it lies the folder `checkpoints`, whose files count. `slow`: seconds to sleep at each operation on them, and
    perhaps, after a space, a text: then on those paths only that hold it. `kill`: number of the operation, counted from
    the making of a step's folder, before which rank 0's process is killed. `trace`: the file to which its operations
    are appended, one per line.
    """
    return (
        f"from tests.saving_process import install; install({str(controls)!r}); "
        "from griffin.trainer.checkpoint.saving.process import main; main()"
    )


def install(controls: str) -> None:
    root = os.path.join(controls, "checkpoints")
    slow, kill, trace = (Path(controls, name) for name in ("slow", "kill", "trace"))
    lock, thread = threading.Lock(), threading.local()
    count = -1  # before the first step's folder, and on other ranks

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _OPERATIONS or getattr(thread, "is_in_hook", False):
            return
        path = str(arguments[0])
        # Removed are files of a checkpoint only, by names within their folders.
        if not path.startswith(root) and event not in ("os.remove", "os.rmdir"):
            return
        # Which of several ranks creates an array is a matter of chance, and the count must be the same in every save.
        if (event == "os.mkdir" and not path.endswith(".tmp")) or os.path.basename(path).startswith("zarr.json."):
            return
        thread.is_in_hook = True
        try:
            with lock:
                if event == "os.mkdir" and path.endswith(".tmp"):
                    count = 0
                elif count >= 0:
                    count += 1
                if count >= 0 and trace.exists():
                    with trace.open("a") as file:
                        file.write(f"{event} {path}\n")
                if count >= 0 and kill.exists() and count == int(kill.read_text()):
                    os.kill(os.getpid(), signal.SIGKILL)
            with suppress(FileNotFoundError):
                seconds, _, text = slow.read_text().partition(" ")
                if text in path:
                    time.sleep(float(seconds or 0))
        finally:
            thread.is_in_hook = False

    sys.addaudithook(hook)

"""Whole runs of a small model, and what tests do inside of their ranks: note what they train on, and disturb them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from griffin.launch.local import run_local
from griffin.parallel.world.ranks import Ranks
from griffin.tools.commands.train import PRELOAD, train_rank
from griffin.trainer.checkpoint.manifest import read_manifest
from griffin.trainer.checkpoint.saving import saver as saver_module
from griffin.trainer.checkpoint.saving.saver import Saver
from griffin.trainer.checkpoint.source import InitFrom
from griffin.trainer.checkpoint.steps import steps
from griffin.trainer.data.dataset import Samples
from griffin.trainer.data.prefix import read_info
from griffin.trainer.loop import train
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.step_name import step_name
from griffin.trainer.settings.sections import Config
from griffin.trainer.step import Training
from tests import saving_process
from tests.data_sets import write_prefix

CONFIG = """
[model]
pattern = ["recurrent", "attention", "recurrent"]
width = 32
recurrent_width = 32
heads = 2
head_dim = 16
gate_blocks = 2
window = 16

[data]
train = ["{folder}/train"]
eval = "{folder}/eval"
sequence_length = 32
workers = 0

[optimizer]
learning_rate = 1e-2
warmup_steps = 2

[train]
steps = 12
global_batch = 8
micro_batch = 2
dtype = "float32"
eval_interval = 5
eval_batches = 2

[log]
interval = 4
"""
PATIENCE = 60.0  # seconds; what is waited for takes below one on an idle machine


def write_config(folder: Path) -> Path:
    """A config whose data are documents of a repeated word, of 1 to 60 bytes."""
    generator = np.random.default_rng(0)
    for name, documents in (("train", 300), ("eval", 60)):
        lengths = generator.integers(1, 60, documents)
        write_prefix(folder / name, [(b"recurrence " * 6)[:length] for length in lengths], vocabulary=257, eod=256)
        assert read_info(str(folder / name)).documents == documents
    path = folder / "config.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every line that is complete."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]]


def series(run_dir: Path, key: str) -> dict[int, float]:
    """A figure by step; where several attempts logged it, the last one's."""
    return {line["step"]: line[key] for line in metrics(run_dir) if key in line}


def saved_steps(run_dir: Path) -> list[int]:
    return [step for step, _ in steps(run_dir / "checkpoints")]


def saved_files(run_dir: Path, step: int) -> Any:
    """Size and checksum of every file of a checkpoint: all of its bits."""
    return read_manifest(run_dir / "checkpoints" / step_name(step)).files


def snapshot(path: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file below a folder with its time of change and content."""
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


def wait_for(what: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What happens inside of a run's ranks. Travels by pickle.

    `notes` is a folder in which each rank notes, in a file rank-N, the samples of every step that it trains on.
    `at_step` has what rank R does before it makes step S, by (R, S). `at_save` has what rank 0 does, with its Saver,
    when it is about to begin the save of step S, the one before having ended; and `at_wait` when the training is about
    to wait for it. With `slow`, every operation of saving processes on a checkpoint's files takes so many seconds.
    """

    notes: Path | None = None
    at_step: Mapping[tuple[int, int], Callable[[], object]] = field(default_factory=dict)
    at_save: Mapping[int, Callable[[Saver], object]] = field(default_factory=dict)
    at_wait: Mapping[int, Callable[[Saver], object]] = field(default_factory=dict)
    slow: float = 0

    @contextmanager
    def installed(self, ranks: Ranks, run_dir: Path) -> Iterator[None]:
        draw, make_step, start, wait = Samples.__getitem__, Training.step, Saver.start, Saver.wait
        notes = self.notes / f"rank-{ranks.rank}" if self.notes is not None else Path(os.devnull)

        def numbered(samples: Samples, n: int) -> dict[str, torch.Tensor]:
            return draw(samples, n) | {"number": torch.tensor(n)}

        def noted(batches: Iterator[Any], step: int) -> Iterator[Any]:
            for batch in batches:
                with notes.open("a") as file:
                    file.write(f"{step} {' '.join(map(str, batch['number'].tolist()))}\n")
                yield {name: value for name, value in batch.items() if name != "number"}

        def watched_step(training: Training, batches: Iterator[Any], **others: Any) -> Any:
            step = training.steps_done + 1
            self.at_step.get((ranks.rank, step), lambda: None)()
            return make_step(training, noted(batches, step), **others)

        def watched_start(saver: Saver, step: int, header: Any) -> None:
            if ranks.rank == 0 and step in self.at_save:
                self.at_save[step](saver)
            start(saver, step, header)

        def watched_wait(saver: Saver) -> Any:
            if ranks.rank == 0 and saver._pending is not None and saver._pending.step in self.at_wait:
                self.at_wait[saver._pending.step](saver)
            else:
                assert not _stopped, "the training waits for a saving process that stands still"
            return wait(saver)

        with ExitStack() as stack:
            replaced: list[tuple[Any, str, Any]] = [
                (Samples, "__getitem__", numbered),
                (Training, "step", watched_step),
                (Saver, "start", watched_start),
                (Saver, "wait", watched_wait),
            ]
            if self.slow:
                (run_dir / "slow").write_text(str(self.slow))
                replaced.append((saver_module, "PROGRAM", saving_process.code(run_dir)))
            for owner, name, value in replaced:
                stack.enter_context(mock.patch.object(owner, name, value))
            stack.callback(_continue_all)
            yield


def run(
    ranks: Ranks, config: Config, run_dir: Path, init_from: InitFrom | None = None, watch: Watch | None = None
) -> bool:
    """`train`, watched: for ranks of the pool."""
    with (watch or Watch()).installed(ranks, run_dir):
        return train(config, ranks, run_dir, init_from)


def launch(world_size: int, config: Config, run_dir: Path, watch: Watch | None = None) -> int:
    """Exit code of `griffin train`, watched, with ranks of the local launcher; this process is the launcher."""

    def give_up(number: int, frame: Any) -> None:
        raise TimeoutError("the run has not ended")

    handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(int(2 * PATIENCE))
    try:
        return run_local(_run_rank, world_size, (config, run_dir, watch or Watch()), preload=PRELOAD)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def _run_rank(ranks: Ranks, config: Config, run_dir: Path, watch: Watch) -> None:
    with watch.installed(ranks, run_dir):
        train_rank(ranks, config, run_dir, None)


def notes(folder: Path, ranks: Iterable[int]) -> dict[int, list[int]]:
    """The samples that these ranks noted together for each step, sorted."""
    found: dict[int, list[int]] = {}
    for rank in ranks:
        for line in (folder / f"rank-{rank}").read_text().splitlines():
            step, *numbers = map(int, line.split())
            found.setdefault(step, []).extend(numbers)
    return {step: sorted(numbers) for step, numbers in sorted(found.items())}


# What to do at a step or at a save.


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_this_process(number: int) -> None:
    os.kill(os.getpid(), number)


def signal_launcher(process: int, number: int) -> None:
    """Returns once the signal has been passed on to this rank."""
    heard = threading.Event()
    handler = signal.getsignal(number)
    assert callable(handler), "the run heeds this signal"

    def note(got: int, frame: Any) -> None:
        handler(got, frame)
        heard.set()

    signal.signal(number, note)
    try:
        os.kill(process, number)
        wait_for(heard.is_set)
    finally:
        signal.signal(number, handler)


def die_once_saved(run_dir: Path, step: int) -> None:
    wait_until_saved(run_dir, step)
    kill_this_process()


def die_amid_save(run_dir: Path, step: int) -> None:
    """Once some chunks of it are written."""
    root, name = RunFolder(run_dir).checkpoints, f"{step_name(step)}.*.tmp"
    wait_for(lambda: len(list(root.glob(f"{name}/*/c*"))) > 3)
    assert not list(root.glob(f"{name}/manifest.json"))
    kill_this_process()


def meet(arrived: Path, released: Path) -> None:
    """Make one file and wait for the other."""
    arrived.touch()
    wait_for(released.exists)


def wait_until_saved(run_dir: Path, step: int) -> None:
    wait_for((run_dir / "checkpoints" / step_name(step)).exists)


_stopped: list[int] = []  # saving processes of this rank that do not run


def stop_saving(saver: Saver) -> None:
    """From before the save that is about to begin."""
    assert saver._ensure_ready() is None
    assert saver._process is not None
    os.kill(saver._process.pid, signal.SIGSTOP)
    _stopped.append(saver._process.pid)


def continue_saving() -> None:
    os.kill(_stopped.pop(), signal.SIGCONT)


def _continue_all() -> None:
    while _stopped:
        continue_saving()


def continue_saving_in(seconds: float, saver: Saver) -> None:
    threading.Timer(seconds, continue_saving).start()

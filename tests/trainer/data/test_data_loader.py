"""Batches: the same global batch in every layout, from any step, with or without worker processes."""

import errno
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from griffin.trainer.data.dataset import open_samples
from griffin.trainer.data.loader import WorkerError, batches, sample_numbers, watching_workers
from griffin.trainer.data.prefix import PrefixWriter
from griffin.trainer.run.signals import StopRequests
from griffin.trainer.settings.complete import load_config
from tests.small_runs import Watch, launch, write_config

ROOT = Path(__file__).parents[3]
KEYS = {"tokens", "labels", "loss_mask", "positions"}
OFFSETS = {"cu_seqlens", "max_seqlen"}


@pytest.fixture
def samples(tmp_path):
    writer = PrefixWriter(str(tmp_path / "p"), {"kind": "test", "vocabulary": 50, "eod": 49, "sha256": None}, "t", None)
    rng = np.random.default_rng(0)
    for _ in range(40):
        writer.add(np.append(rng.integers(0, 49, rng.integers(0, 9)), 49))
    writer.finish(["test"])
    writer.publish()
    return open_samples([str(tmp_path / "p")], sequence_length=8, seed=1)


def test_sample_numbers():
    layout = {"global_batch": 12, "micro_batch": 2, "data_size": 3}
    assert sample_numbers(0, **layout, data_rank=0) == [[0, 1], [6, 7]]
    assert sample_numbers(0, **layout, data_rank=2) == [[4, 5], [10, 11]]
    assert sample_numbers(24, **layout, data_rank=1) == [[26, 27], [32, 33]]


@pytest.mark.parametrize(("micro_batch", "data_size"), [(1, 1), (12, 1), (1, 12), (2, 3), (3, 2), (4, 3), (1, 4)])
@pytest.mark.parametrize("first_sample", [0, 36, 7])
def test_a_step_is_the_same_samples_on_every_layout(samples, micro_batch, data_size, first_sample):
    micro_batches = 12 // (micro_batch * data_size)
    layout = {"global_batch": 12, "micro_batch": micro_batch, "data_size": data_size}
    ranks = [batches(samples, first_sample=first_sample, **layout, data_rank=rank) for rank in range(data_size)]
    for first in (first_sample, first_sample + 12):
        parts = [next(ranks[rank]) for _ in range(micro_batches) for rank in range(data_size)]
        assert all(part["tokens"].shape == (micro_batch, 8) for part in parts)
        assert all(part.keys() == KEYS | OFFSETS for part in parts)
        whole = {key: torch.cat([part[key] for part in parts]) for key in KEYS}
        for i in range(12):
            assert all(torch.equal(whole[key][i], samples[first + i][key]) for key in KEYS)


def test_worker_processes_change_nothing(samples):
    layout = {"global_batch": 4, "micro_batch": 2, "data_rank": 1, "data_size": 2}
    drawn = [list(islice(batches(samples, first_sample=4, **layout, workers=workers), 60)) for workers in (0, 2)]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*drawn, strict=True) for key in KEYS | OFFSETS)


def test_offsets_are_those_of_the_documents_of_all_sequences(samples):
    (batch,) = islice(batches(samples, first_sample=0, global_batch=4, micro_batch=4, data_rank=0, data_size=1), 1)
    begins = [place for place, position in enumerate(batch["positions"].flatten().tolist()) if position == 0]
    assert len(begins) > 4
    found = batch["cu_seqlens"].tolist()
    assert found[: len(begins)] == begins
    assert set(found[len(begins) :]) == {4 * 8}  # the end, and documents without tokens
    assert int(batch["max_seqlen"]) == max(end - begin for begin, end in itertools.pairwise([*begins, 4 * 8]))


def test_workers_are_forked_whatever_the_default(samples):
    """In a rank started by a fork server, workers would by default be started by one too and import everything."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        loader, workers = started(samples)
    finally:
        multiprocessing.set_start_method(before, force=True)
    parents = [Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[1] for worker in workers]
    assert parents == [str(os.getpid())] * 2
    del loader


@pytest.mark.parametrize("workers", [0, 1])
def test_torch_random_state_is_left_alone(samples, workers):
    state = torch.get_rng_state()
    next(batches(samples, first_sample=0, global_batch=2, micro_batch=2, data_rank=0, data_size=1, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch": 10},
            "global_batch 10: expected a positive multiple of micro_batch 2 x 2 data-parallel ranks",
        ),
        ({"global_batch": 0}, "global_batch 0: expected"),
        ({"micro_batch": 0}, "expected a positive multiple of micro_batch 0"),
        ({"first_sample": -1}, "first_sample -1"),
        ({"data_rank": 2}, "data_rank 2 of 2: out of range"),
    ],
)
def test_refusals(samples, changes, message):
    arguments = {"first_sample": 0, "global_batch": 8, "micro_batch": 2, "data_rank": 0, "data_size": 2} | changes
    with pytest.raises(ValueError, match=message):
        batches(samples, **arguments)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_stops_the_loader(samples, tmp_path, workers):
    with open(tmp_path / "p.bin", "r+b") as file:
        file.write(b"\xff" * 20)
    loader = batches(samples, first_sample=0, global_batch=8, micro_batch=8, data_rank=0, data_size=1, workers=workers)
    with pytest.raises(ValueError, match=r"p\.bin is damaged: sample \d+: token id 65535"):
        list(islice(loader, samples.samples_per_epoch))


def started(samples):
    """A loader that has read a batch, and its two worker processes."""
    others = set(multiprocessing.active_children())
    loader = batches(samples, first_sample=0, global_batch=2, micro_batch=2, data_rank=0, data_size=1, workers=2)
    workers = sorted(set(multiprocessing.active_children()) - others, key=lambda worker: worker.pid)
    assert len(workers) == 2
    for _ in range(2):  # one batch of each: it is set up
        next(loader)
    return loader, workers


def draw_after_a_death(samples, said):
    loader, workers = started(samples)
    os.kill(workers[0].pid, signal.SIGKILL)
    try:
        with watching_workers(2):
            list(islice(loader, 100))
    except WorkerError as error:
        said.send(str(error))
    for worker in workers:
        worker.kill()
    os._exit(0)


def test_killed_worker_is_reported_in_one_line(samples):
    """In its own process: as long as the loader exists, PyTorch raises such deaths anywhere in the process."""
    fork = multiprocessing.get_context("fork")
    said, saying = fork.Pipe(duplex=False)
    rank = fork.Process(target=draw_after_a_death, args=(samples, saying))
    rank.start()
    assert said.poll(30)
    assert re.fullmatch(r"data\.workers = 2: .*/dev/shm.*\(DataLoader worker \(pid.*\)", said.recv())
    rank.join(30)
    assert rank.exitcode == 0


def kill_workers():
    for worker in multiprocessing.active_children():
        worker.kill()


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_ends_with_one_line(tmp_path, capsys):
    config = load_config(write_config(tmp_path), ["--data.workers=1", "--train.eval_interval=0"])
    assert launch(1, config, tmp_path / "run", Watch(at_step={(0, 3): kill_workers})) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"griffin: rank 0 of 1 failed \(exit code 1\)\nWorkerError: data\.workers = 1: .*/dev/shm.*\n", said
    )


def test_workers_that_cannot_be_started_are_reported_in_one_line(samples, monkeypatch):
    def start(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", start)
    with pytest.raises(WorkerError, match=r"^data\.workers = 2: .*/dev/shm.*No space left on device\)$"):
        started(samples)


def test_other_errors_of_a_worker_are_left_as_they_are():
    text = "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: no such thing"
    with pytest.raises(RuntimeError, match=f"^{text}$") as said, watching_workers(2):
        raise RuntimeError(text)
    assert not isinstance(said.value, WorkerError)


DRAW = """
import sys
from itertools import islice
from griffin.trainer.data.dataset import open_samples
from griffin.trainer.data.loader import batches, watching_workers
samples = open_samples([sys.argv[1]], sequence_length=8, seed=1)
layout = dict(global_batch=2**14, micro_batch=2**14, data_rank=0, data_size=1)
with watching_workers(2):
    list(islice(batches(samples, first_sample=0, workers=2, **layout), 3))
"""


@pytest.mark.slow
def test_full_shared_memory_is_reported_in_one_line(samples, tmp_path):
    """In its own namespace, whose /dev/shm holds 256 KiB; the data are elsewhere, or they would be hidden."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        shutil.copytree(tmp_path, folder, dirs_exist_ok=True)
        small = 'mount -t tmpfs -o size=256k tmpfs /dev/shm || exit 77; exec "$0" -c "$1" "$2"'
        command = ["unshare", "--mount", "sh", "-c", small, sys.executable, DRAW, str(folder / "p")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    finally:
        shutil.rmtree(folder)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount file systems")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"WorkerError: data\.workers = 2: .*/dev/shm \(\d+ MiB are free\).*No space left on device", last)


def test_workers_ignore_signals_of_others(samples):
    """Signals such as those of a launcher, to the process group of a rank or to all processes of a job."""
    with StopRequests() as requests:
        loader, workers = started(samples)
        for name in ("TERM", "INT", "USR1"):
            subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
        for _ in range(50):
            next(loader)
        assert all(worker.is_alive() for worker in workers)
        assert requests.requested is None


def test_starting_workers_ignore_signals_of_others(samples, monkeypatch):
    seed = random.seed
    monkeypatch.setattr(random, "seed", lambda *given: (time.sleep(0.2), seed(*given)))  # PyTorch's workers call it
    others = set(multiprocessing.active_children())
    with StopRequests():
        loader = batches(samples, first_sample=0, global_batch=2, micro_batch=2, data_rank=0, data_size=1, workers=1)
        (worker,) = set(multiprocessing.active_children()) - others
        for name in ("TERM", "INT", "USR1"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        next(loader)
        assert worker.is_alive()


def test_signals_of_the_rank_are_unchanged(samples):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    started(samples)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_workers_end_with_their_loader(samples):
    with StopRequests():
        loader, workers = started(samples)
        began = time.monotonic()
        del loader
        assert time.monotonic() - began < 4  # PyTorch waits for 5 s, and terminates them then
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_workers_end_when_their_rank_says_so(samples):
    """With SIGTERM, which an exiting process sends to its children."""
    with StopRequests():
        loader, workers = started(samples)
        for worker in workers:
            worker.terminate()
            worker.join(4)
        assert [worker.exitcode for worker in workers] == [0, 0]
        del loader

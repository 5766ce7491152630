"""Saving processes: what they write, that training continues meanwhile, and which connections they accept."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from griffin.trainer.checkpoint.plan import SavePlan
from griffin.trainer.checkpoint.saving import saver as saver_module
from griffin.trainer.checkpoint.saving.exchange import CONTROL, VALUES, Exchange, Listener
from griffin.trainer.checkpoint.saving.saver import Saver
from griffin.trainer.checkpoint.steps import steps
from tests import saving_process
from tests.saving import Layout, Team, assert_holds, random_state


@pytest.mark.parametrize(
    ("tensor_size", "data_size", "dtype", "seed"),
    [(1, 1, "float32", 0), (1, 1, "bfloat16", 0), (2, 2, "float32", 1), (1, 3, "bfloat16", 2)],
)
def test_a_checkpoint_is_what_was_staged(
    tmp_path: Path, tensor_size: int, data_size: int, dtype: str, seed: int
) -> None:
    layout = Layout(tensor_size, data_size, dtype, seed)
    with Team(layout, tmp_path / "checkpoints") as team:
        open_files = []
        for step in (1, 2):
            state = random_state(step)
            if step == 2:  # as before Adam's first step
                for values in state.values():
                    values[1:] = 0
            outcomes = team.save(step, state)
            for saver in team.savers:
                saver.staging[...] = np.nan  # the rank may change it again
            assert [(outcome.path, outcome.error, outcome.warning) for outcome in outcomes if outcome] == [
                (tmp_path / "checkpoints" / f"step-0000000{step}", None, None)
            ] * layout.size
            manifest = assert_holds(outcomes[0].path, state, dtype)  # type: ignore[union-attr]
            assert manifest.samples == 8 * step
            assert {spec.name for spec in layout.arrays} == set(manifest.arrays)
            chunks = [size for name, size in _sizes(manifest).items() if not name.endswith("zarr.json")]
            assert len(chunks) == layout.files
            assert [outcome.bytes for outcome in outcomes if outcome] == [sum(chunks)] * layout.size
            assert team.wait() == [None] * layout.size  # each outcome is returned once
            open_files.append([len(os.listdir(f"/proc/{team.pid(rank)}/fd")) for rank in range(layout.size)])
        assert open_files[0] == open_files[1], "connections are left open"


def _sizes(manifest) -> dict[str, int]:
    return {name: record.size for name, record in manifest.files.items()}


def test_a_rank_may_hold_nothing(tmp_path: Path) -> None:
    """There may be more data-parallel ranks than elements."""
    layout = Layout(1, 2, empty=True)
    assert layout.plans[0].elements == 0
    with Team(layout, tmp_path / "checkpoints") as team:
        outcome = team.save(1, random_state(1))[0]
        assert outcome is not None
        assert_holds(outcome.path, random_state(1), "float32")


def test_training_continues_during_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "PROGRAM", saving_process.code(tmp_path))
    (tmp_path / "slow").write_text("0.004")
    state = random_state(1)
    with Team(Layout(1, 1), tmp_path / "checkpoints") as team:
        (saver,) = team.savers
        team.start(1, state)
        done, outcome = 0, saver.poll()
        while outcome is None:
            np.linalg.inv(np.eye(50) + done)  # a step's work
            done += 1
            time.sleep(0.01)
            outcome = saver.poll()
        # 200 operations of 0.004 s, of which 4 may run at a time: longer than 10 steps of little more than 0.01 s.
        assert done >= 10
        assert saver.poll() is None
        assert outcome.error is None
        assert_holds(outcome.path, state, "float32")
        team.start(2, random_state(2))
        begun = time.monotonic()
        second = saver.wait()
        assert second is not None
        assert second.error is None
        assert time.monotonic() - begun > 0.2  # it waited
        assert second.seconds > 0.2


def test_old_checkpoints_are_removed_after_the_commit(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    with Team(Layout(1, 1), root, keep_last=1, keep_every=2) as team:
        for step in (1, 2, 3):
            team.save(step, random_state(step))
        assert [step for step, _ in steps(root)] == [2, 3]
        assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_run_that_lost_its_lock_commits_nothing(tmp_path: Path) -> None:
    root, lock = tmp_path / "checkpoints", tmp_path / "lock"
    with Team(Layout(1, 2), root, lock=(lock, "0" * 32)) as team:
        outcomes = team.save(1, random_state(1))
        for outcome in outcomes:
            assert outcome is not None
            assert outcome.path is None
            assert outcome.error == f"{lock} is gone; without it another run may write the folder as well"
    assert not root.exists()


def test_a_saving_process_ends_only_with_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "PROGRAM", saving_process.code(tmp_path))
    with Team(Layout(1, 1), tmp_path / "checkpoints") as team:
        team.save(1, random_state(1))
        (tmp_path / "slow").write_text("0.05")
        team.start(2, random_state(2))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(team.pid(0), number)
        assert os.getpriority(os.PRIO_PROCESS, team.pid(0)) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
        time.sleep(0.2)
        process = team.savers[0]._process
        assert process is not None
        assert process.poll() is None
        team.savers[0]._control.close()  # as when the rank's process ends
        assert process.wait(2) == 0  # although the save would take seconds
    assert [step for step, _ in steps(tmp_path / "checkpoints")] == [1]


_KILLED_RANK = """
import os, signal, sys, time
from pathlib import Path
from tests.saving import Layout
from griffin.trainer.checkpoint.saving.saver import Saver
settings = dict(rank=0, world_size=1, host="127.0.0.1", keep_last=0, keep_every=0, lock=None)
saver = Saver(root=Path("checkpoints"), plan=Layout(1, 1).plans[0], all_gather=lambda value, _: [value], **settings)
assert saver._ensure_ready() is None
worker = os.fork()
if worker == 0:
    time.sleep(20)
    os._exit(0)
print(saver._process.pid, worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_saving_process_ends_with_a_killed_rank_that_has_workers(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with open(tmp_path / "said", "w") as said:  # not a pipe, which the worker would hold open as well
        subprocess.run([sys.executable, "-c", _KILLED_RANK], cwd=tmp_path, env=environment, stdout=said, timeout=30)
    saving, worker = map(int, (tmp_path / "said").read_text().split())
    try:
        deadline = time.monotonic() + 3
        while _runs(saving):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert _runs(worker)  # holds the rank's end of the connection
    finally:
        os.kill(worker, signal.SIGKILL)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_rank_names_a_rank_without_memory(tmp_path: Path) -> None:
    plans = [SavePlan(rank=rank, dtype="float32", shards=(), elements=0, chunks=(), arrays=()) for rank in range(2)]
    plans[1] = SavePlan(rank=1, dtype="float32", shards=(), elements=2**50, chunks=(), arrays=())
    layout = Layout(1, 2)
    layout.plans = plans
    message = r"rank 1 on 127\.0\.0\.1: no memory for 12582912\.00 GiB of staged state"
    caught = []

    class Observed(Team):
        def each(self, call):
            def attempt(rank: int) -> None:
                with pytest.raises(MemoryError, match=message):
                    call(rank)
                caught.append(rank)

            return super().each(attempt)

    Observed(layout, tmp_path)
    assert sorted(caught) == [0, 1]


class TestListener:
    """Strangers are not let in, and do not block anyone."""

    def exchange(self, listener: Listener | None, key: bytes, rank: int, port: int) -> Exchange:
        addresses = [("127.0.0.1", port)] * 2
        return Exchange(listener, key, save=1, rank=rank, addresses=addresses, timeout=5)

    def test_only_who_knows_the_key_is_let_in(self) -> None:
        listener = Listener("127.0.0.1", b"k" * 32, timeout=5)
        mute = socket.create_connection(("127.0.0.1", listener.port))
        noisy = socket.create_connection(("127.0.0.1", listener.port))
        noisy.sendall(b"GET / HTTP/1.1\r\nHost: a name that is longer than a greeting's length\r\n\r\n")
        stranger = self.exchange(None, b"x" * 32, 1, listener.port)
        with pytest.raises(ConnectionError, match=r"lost the saving process of rank 0 on 127\.0\.0\.1"):
            stranger.connect(0, CONTROL)
        friend = self.exchange(None, b"k" * 32, 1, listener.port)
        friend.connect(0, CONTROL).send_message({"answer": 42})
        here = self.exchange(listener, b"k" * 32, 0, listener.port)
        assert here.accept(1, CONTROL).receive_message() == {"answer": 42}
        for end in (mute, noisy):
            end.close()
        for exchange in (stranger, friend, here):
            exchange.close()

    def test_who_does_not_answer_is_given_up(self) -> None:
        listener = Listener("127.0.0.1", b"k" * 32, timeout=0.2)
        here = Exchange(listener, b"", save=1, rank=0, addresses=[("a", 1), ("b", 2)], timeout=0.2)
        with pytest.raises(ConnectionError, match=r"the saving process of rank 1 on b did not connect within 0\.2 s"):
            here.accept(1, CONTROL)
        friend = self.exchange(None, b"k" * 32, 1, listener.port)
        friend.connect(0, CONTROL)
        with pytest.raises(ConnectionError, match=r"no answer from the saving process of rank 1 on b within 0\.2 s"):
            here.accept(1, CONTROL).receive()
        friend.close()
        with pytest.raises(ConnectionError, match="lost the saving process of rank 1 on b"):
            here.accept(1, CONTROL).receive()
        here.close()

    def test_threads_that_wait_are_woken(self) -> None:
        listener = Listener("127.0.0.1", b"k" * 32, timeout=60)
        here = self.exchange(listener, b"k" * 32, 0, listener.port)
        caught: list[Exception] = []

        def wait() -> None:
            try:
                here.accept(1, CONTROL)
            except ConnectionError as error:
                caught.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        here.abort()
        thread.join(5)
        assert str(caught[0]) == "the save was aborted"

    def test_values_are_awaited_however_long(self) -> None:
        """Until the save is aborted: the timeout is for control connections."""
        listener = Listener("127.0.0.1", b"k" * 32, timeout=0.2)
        addresses = [("127.0.0.1", listener.port)] * 2
        here, there = (
            Exchange(kept, b"k" * 32, save=1, rank=rank, addresses=addresses, timeout=0.2)
            for rank, kept in enumerate((listener, None))
        )
        values = np.arange(2**24, dtype=np.float32)  # 64 MiB: more than socket buffers hold
        received = np.empty_like(values)
        with ThreadPoolExecutor() as threads:
            channel = threads.submit(here.accept, 1, VALUES)
            time.sleep(0.5)
            sent = threads.submit(lambda: there.connect(0, VALUES).send(values))
            channel.result(5)
            time.sleep(0.5)
            assert not sent.done()
            channel.result().receive_values(received)
            sent.result(5)
            np.testing.assert_array_equal(received, values)
            waiting = threads.submit(channel.result().receive)
            time.sleep(0.5)
            assert not waiting.done()
            here.abort()
            with pytest.raises(ConnectionError, match="lost the saving process of rank 1"):
                waiting.result(5)
        for exchange in (here, there):
            exchange.close()


def test_a_saver_that_never_saves_leaves_nothing(tmp_path: Path) -> None:
    saver = Saver(
        root=tmp_path / "checkpoints",
        plan=Layout(1, 1).plans[0],
        all_gather=lambda value, _: [value],
        rank=0,
        world_size=1,
        host="127.0.0.1",
        keep_last=0,
        keep_every=0,
        lock=None,
    )
    assert saver.poll() is None
    assert saver.wait() is None
    saver.close()
    saver.close()
    assert not (tmp_path / "checkpoints").exists()

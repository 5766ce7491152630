"""Rank 0's console if it cannot be written. Its appearance is tested with the run folder."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest

from griffin.trainer.reporting.console import Console
from griffin.trainer.run.folder import RunFolder

VALUES = {"loss": 5.25, "tokens_per_second": 100.0}


def test_a_full_disk_loses_lines_of_the_log_and_no_more(tmp_path: Path) -> None:
    log, stream = tmp_path / "console.log", io.StringIO()
    log.symlink_to("/dev/full")
    with Console(RunFolder(tmp_path), steps=10, stream=stream) as console:
        console.print("one")
        console.step(1, VALUES)
        assert [line for line in stream.getvalue().splitlines() if "cannot" in line] == [
            "console.log cannot be written: [Errno 28] No space left on device; training continues without it"
        ]
        assert stream.getvalue().startswith("one\n")
        log.unlink()
        console.print("two")
    assert log.read_text() == "two\n"


def test_the_error_that_ends_a_run_is_raised_though_it_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "console.log").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match="cold"), Console(RunFolder(tmp_path), steps=2, stream=io.StringIO()):
        raise RuntimeError("the oven is cold")


def test_loss_over_no_token_has_no_value(tmp_path: Path) -> None:
    with Console(RunFolder(tmp_path), steps=2, stream=io.StringIO()) as console:
        console.step(1, {"loss": 0.0, "loss_tokens": 0, "grad_norm": 0.0})
        console.step(2, {"loss": 0.0, "loss_tokens": 5, "grad_norm": 0.0})
    first, last = (tmp_path / "console.log").read_text().splitlines()
    assert first == "step 1/2  loss: no token was predicted  grad_norm 0.000"
    assert last.startswith("step 2/2  loss 0.0000  grad_norm 0.000")


class Gone(io.StringIO):
    """A closed terminal, or a pipe whose reader has exited."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal
        self.is_gone = False

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        if self.is_gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
def test_log_continues_without_a_terminal(tmp_path: Path, terminal: bool) -> None:
    stream = Gone(terminal)
    with Console(RunFolder(tmp_path), steps=3, stream=stream) as console:
        console.print("one")
        stream.is_gone = True
        console.print("two")
        for step in (1, 2, 3):
            console.step(step, VALUES)
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert lines[:2] == ["one", "two"]
    assert [line.split()[1] for line in lines[2:]] == ["1/3", "2/3", "3/3"]

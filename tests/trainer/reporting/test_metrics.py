from __future__ import annotations

import contextlib
import json
import math
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from griffin.trainer.reporting.metrics import MetricsWriter
from griffin.trainer.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "config.toml").write_text("[model]\nwidth = 32\n")
    return RunFolder(tmp_path)


def lines(folder: RunFolder) -> list[dict[str, float | None]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in folder.metrics.read_text().splitlines()]


def test_every_line_is_there_at_once(folder: RunFolder) -> None:
    with MetricsWriter(folder, tensorboard=False) as metrics:
        metrics.log(1, {"loss": 5.5, "tokens": 4096})
        (line,) = lines(folder)
        assert list(line) == ["step", "attempt", "time", "loss", "tokens"]
        assert line | {"time": 0} == {"step": 1, "attempt": 1, "time": 0, "loss": 5.5, "tokens": 4096}
        assert line["time"] == pytest.approx(time.time(), abs=60)
        metrics.log(2, {"eval_loss": 5.0})
    assert lines(folder)[1] | {"time": 0} == {"step": 2, "attempt": 1, "time": 0, "eval_loss": 5.0}
    assert not folder.tensorboard.exists()


def test_lines_are_appended_with_the_number_of_the_attempt(folder: RunFolder) -> None:
    for attempt, step in ((1, 5), (2, 4)):
        with MetricsWriter(folder, tensorboard=False, attempt=attempt, start=step - 1) as metrics:
            metrics.log(step, {"loss": 1.0})
    assert [(line["step"], line["attempt"]) for line in lines(folder)] == [(5, 1), (4, 2)]


def test_truncated_line_spoils_no_other(folder: RunFolder) -> None:
    folder.metrics.write_text('{"step": 1}\n{"step": 2, "lo')
    with MetricsWriter(folder, tensorboard=False, attempt=2) as metrics:
        metrics.log(2, {"loss": 1.0})
    cut, line = folder.metrics.read_text().splitlines()[1:]
    assert cut == '{"step": 2, "lo'
    assert json.loads(line) | {"time": 0} == {"step": 2, "attempt": 2, "time": 0, "loss": 1.0}


def test_non_finite_figures_are_null(folder: RunFolder) -> None:
    with MetricsWriter(folder, tensorboard=False) as metrics:
        metrics.log(1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 1})
    (line,) = lines(folder)
    assert line | {"time": 0} == {"step": 1, "attempt": 1, "time": 0, "loss": None, "grad_norm": None, "tokens": 1}


def test_tensorboard_has_the_same_and_the_config(folder: RunFolder) -> None:
    with MetricsWriter(folder, tensorboard=True) as metrics:
        metrics.log(1, {"loss": 5.5, "tokens": 4096})
        metrics.log(10, {"loss": 4.25, "tokens": 40960})
        events = EventAccumulator(str(folder.events)).Reload()  # flushed: a run that is killed keeps its figures
        assert [(event.step, event.value) for event in events.Scalars("1_loss/loss")] == [(1, 5.5), (10, 4.25)]
        assert [(event.step, event.value) for event in events.Scalars("6_run/tokens")] == [(1, 4096), (10, 40960)]
        (config,) = events.Tensors("config/text_summary")
        assert b"width = 32" in config.tensor_proto.string_val[0]


def test_loss_over_no_token_is_not_plotted(folder: RunFolder) -> None:
    with MetricsWriter(folder, tensorboard=True) as metrics:
        metrics.log(1, {"loss": 5.5, "loss_tokens": 10})
        metrics.log(2, {"loss": 0.0, "loss_tokens": 0})
        metrics.log(2, {"eval_loss": 0.0, "eval_loss_tokens": 0})
    assert [line.get("loss") for line in lines(folder)] == [5.5, 0.0, None]
    events = EventAccumulator(str(folder.events)).Reload()
    assert [event.step for event in events.Scalars("1_loss/loss")] == [1]
    assert [event.value for event in events.Scalars("6_run/loss_tokens")] == [10, 0]
    assert "1_loss/eval_loss" not in events.Tags()["scalars"]
    for key in ("loss", "eval_loss"):
        (text,) = events.Tensors(f"1_loss/{key}/text_summary")
        assert text.tensor_proto.string_val[0] == b"step 2: no token was predicted"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (2, [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]),
        (0, [(0, 2.0), (1, 2.0)]),  # it died before its first checkpoint
    ],
)
def test_curves_continue_with_the_next_attempt(
    folder: RunFolder, start: int, expected: list[tuple[int, float]]
) -> None:
    with MetricsWriter(folder, tensorboard=True) as metrics:
        for step in range(6):
            metrics.log(step, {"loss": 1.0})
    (folder.path / "config.attempt-2.toml").write_text("[model]\nwidth = 64\n")
    with MetricsWriter(RunFolder(folder.path, 2), tensorboard=True, attempt=2, start=start) as metrics:
        for step, _ in expected:
            if step > start or start == 0:
                metrics.log(step, {"loss": 2.0})
    events = EventAccumulator(str(folder.events)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("1_loss/loss")] == expected
    assert b"width = 64" in events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0]


def log_steps(folder: RunFolder, *steps: int) -> None:
    with MetricsWriter(folder, tensorboard=True, attempt=steps[0], start=steps[0] - 1) as metrics:
        for step in steps:
            metrics.log(step, {"loss": float(step), "rglru/decay_mean/all": 0.5})


def shown_runs(logdir: Path) -> dict[str, list[tuple[str, list[int]]]]:
    """Steps of each curve of each run, with TensorBoard's names and order."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    runs = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    return {
        run: [(tag, [event.step for event in runs.Scalars(run, tag)]) for tag in sorted(tags["scalars"])]
        for run, tags in runs.Runs().items()
    }


CURVES = ("1_loss/loss", "5_rglru/decay_mean/all")


def test_the_run_is_shown_by_its_name_also_when_it_was_renamed(folder: RunFolder, tmp_path: Path) -> None:
    first = RunFolder(folder.path / "first")
    first.path.mkdir()
    shutil.copy(folder.config, first.config)
    log_steps(first, 1, 2)
    assert shown_runs(first.events.parent) == {"first": [(tag, [1, 2]) for tag in CURVES]}
    second = RunFolder(first.path.rename(tmp_path / "second"))
    log_steps(second, 2, 3)
    assert shown_runs(second.events.parent) == {"second": [(tag, [1, 2, 3]) for tag in CURVES]}
    assert shown_runs(tmp_path) == {"second/tensorboard/second": [(tag, [1, 2, 3]) for tag in CURVES]}


def test_run_of_an_older_version_keeps_its_tensorboard_layout(folder: RunFolder) -> None:
    with SummaryWriter(str(folder.tensorboard)) as writer:
        for step in (1, 2):
            writer.add_scalar("loss", 1.0, step)
            writer.add_scalar("rglru/decay_mean/all", 0.5, step)
    log_steps(folder, 2, 3)
    curves = [(tag, [1, 2, 3]) for tag in ("loss", "rglru/decay_mean/all")]
    assert folder.events.parent == folder.path
    assert shown_runs(folder.events.parent) == {"tensorboard": curves}
    text = EventAccumulator(str(folder.events)).Reload().Tensors("custom_scalars__config__")[-1]
    assert b"^loss$" in text.tensor_proto.string_val[0]


def test_histograms_read_back(folder: RunFolder) -> None:
    with MetricsWriter(folder, tensorboard=True) as metrics:
        metrics.histograms(3, {"rglru/log2_memory/layer-00": ([1.0, 1.5, 2.0], [4.0, 0.0, 2.0])})
    (event,) = EventAccumulator(str(folder.events)).Reload().Histograms("5_rglru/log2_memory/layer-00")
    assert event.step == 3
    value = event.histogram_value
    assert (value.num, value.min, value.max, value.sum) == (6, 1.0, 2.0, 8.0)
    assert dict(zip(value.bucket_limit, value.bucket, strict=True)) == {1.0: 4.0, 1.5: 0.0, 2.0: 2.0}


def test_a_full_disk_loses_lines_and_no_more(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.metrics.symlink_to("/dev/full")
    with MetricsWriter(folder, tensorboard=False) as metrics:
        metrics.log(1, {"loss": 1.0})
        metrics.log(2, {"loss": 1.0})
        assert capsys.readouterr().out == (
            "metrics.jsonl cannot be written: [Errno 28] No space left on device; training continues without it\n"
        )
        folder.metrics.unlink()
        metrics.log(3, {"loss": 1.0})
        assert [line["step"] for line in lines(folder)] == [3]
        folder.metrics.unlink()
        folder.metrics.mkdir()
        metrics.close()
        metrics.log(4, {"loss": 1.0})
    assert capsys.readouterr().out == ""


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writes fail at this size, in the middle of a line, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_line_truncated_by_a_full_disk_spoils_no_other(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(folder, tensorboard=False) as metrics:
        metrics.log(1, {"loss": 1.0})
        with files_of_at_most(folder.metrics.stat().st_size + 10):
            metrics.log(2, {"loss": 1.0})
            metrics.log(3, {"loss": 1.0})
        metrics.log(4, {"loss": 1.0})
        metrics.log(5, {"loss": 1.0})
    first, cut, *rest = folder.metrics.read_text().splitlines()
    assert json.loads(first)["step"] == 1
    assert cut == '{"step": 2'
    # A line 3 found room for its newline only, if at all.
    assert [json.loads(line)["step"] for line in rest if line] == [4, 5]
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written: ") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread ends so
@pytest.mark.parametrize("fails_at_once", [True, False])
def test_tensorboard_is_given_up(folder: RunFolder, fails_at_once: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as stack:
        if fails_at_once:
            folder.tensorboard.write_text("in its way")
        metrics = stack.enter_context(MetricsWriter(folder, tensorboard=True))
        metrics.log(1, {"loss": 1.0})
        if not fails_at_once:
            (events,) = folder.events.iterdir()
            stack.enter_context(files_of_at_most(events.stat().st_size + 5))
        for step in range(2, 30):  # more than its queue holds
            metrics.log(step, {"loss": 1.0, "tokens": 1.0})
        for thread in threading.enumerate():  # TensorBoard's own, whose error shall not come up in another test
            if thread is not threading.current_thread() and type(thread).__module__.startswith("tensorboard."):
                thread.join(timeout=60)
                assert not thread.is_alive()
    said = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("tensorboard/ cannot be written: ")
    ]
    assert len(said) == 1
    if fails_at_once:
        assert [line["step"] for line in lines(folder)] == list(range(1, 30))

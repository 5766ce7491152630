from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from torch import Tensor

from griffin.tools.bench import kernels, kernels_attention
from griffin.tools.bench import kernels_operations as operations
from griffin.tools.bench.kernels import PeerRow, Row, Settings, measure, summary
from griffin.tools.bench.kernels_operations import (
    CONV1D,
    OPERATIONS,
    RGLRU,
    RGLRU_BRANCH,
    Operation,
    Shape,
    Times,
    check,
    copy_bandwidth,
    make_inputs,
    our_implementation,
    time_implementations,
)
from griffin.tools.bench.kernels_plot import plot
from griffin.tools.cli import main
from griffin.tools.common import plots
from tests.tools.bench.small_bench import CPU, SHAPE, SMALL, row, small_clock

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "bench kernels: needs a CUDA device"),
        (["--dtype", "float16"], "--dtype float16: accepted: bfloat16, float32"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--chunk", "-1"], "--chunk -1: must be a number of steps, or 0"),
        (["--widths", "512,0"], "--widths 512,0: must be numbers of at least 1"),
        (["--lengths", "2048,long"], "--lengths 2048,long: must be numbers of at least 1"),
        (["--batches", ""], "--batches : must be numbers of at least 1"),
        (["--plot", "shares.pdf"], "--plot shares.pdf: must end in .png"),
        (["--plot", "nowhere/shares.png"], "--plot nowhere/shares.png: nowhere must be a folder"),
    ],
)
def test_refusals(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *arguments]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.out == ""


def test_an_existing_plot_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "shares.png"
    path.write_bytes(b"kept")
    assert main(["bench", "kernels", "--plot", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(FileExistsError):  # also if it came to be during the measurement
        plot([], path, "a device")
    assert path.read_bytes() == b"kept"


def test_a_plot_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert main(["bench", "kernels", "--plot", str(tmp_path / "shares.png")]) == 2
    assert "needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("operation", "per_element"),
    [(RGLRU, 8 + 16), (RGLRU_BRANCH, 12 + 20), (CONV1D, 4 + 6)],
    ids=["rglru", "branch", "conv1d"],
)
def test_floor(operation: Operation, per_element: int) -> None:
    assert operation.floor_bytes(Shape(512, 2048, 8), 2) == per_element * 512 * 2048 * 8
    assert operation.floor_bytes(SHAPE, 4) == 2 * per_element * SHAPE.elements


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_memory_holds_all_tensors_of_a_pass(operation: Operation) -> None:
    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    shape = Shape(width=70, steps=40, batch=3)
    sets = make_inputs(operation, shape, torch.float32, CPU)
    side = operations.Implementation(lambda leaves: operation.run(leaves, "cpu", None), sets)
    held = sum(size([*one.leaves.values(), one.grad_y]) for one in sets) + size(list(side.results(sets[0]).values()))
    states = shape.elements * 4 if operation is RGLRU_BRANCH else 0  # kept between the passes
    assert held + states < operation.memory(shape, 4)
    large = Shape(4096, 32768, 8)
    assert operation.sets(large, 2) == 1
    assert operation.memory(large, 2) < 1.3 * (held + states) / shape.elements / 4 * 2 * large.elements


def rows_of(printed: str) -> dict[str, list[str]]:
    return {name: re.findall(rf"^{re.escape(name)}  .*$", printed, re.MULTILINE) for name in map(str, NAMES)}


NAMES = [operation.name for operation in OPERATIONS]


@pytest.mark.slow
def test_everything_is_checked_timed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rows, peer_rows = measure(SMALL, CPU, small_clock())
    printed = capsys.readouterr().out
    assert [row.operation for row in rows] == NAMES
    assert peer_rows == []
    assert "R 5, T 12, B 2: as asked for" in printed  # the selector's reason
    for found_row, (line,) in zip(rows, rows_of(printed).values(), strict=True):
        number = r"([\d.,]+)"
        found = re.search(rf"{number} ms +{number} ms +{number} +{number} +{number} x$", line)
        assert found, line
        forward, backward, _, _, over = (float(word.replace(",", "")) for word in found.groups())
        milliseconds_at_the_floor = 1000 * found_row.floor_bytes / found_row.bandwidth
        # Times are printed to a microsecond.
        assert over == pytest.approx((forward + backward) / milliseconds_at_the_floor, rel=0.01)
        assert ("2 chunks of 8" in line) == (found_row.operation != "causal_conv1d")


def test_what_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {operation.name: operation.memory(SHAPE, 4) for operation in OPERATIONS}
    assert needed["causal_conv1d"] < needed["rglru"] < needed["rglru + branch"]
    monkeypatch.setattr(operations, "free_bytes", lambda device: needed["causal_conv1d"])
    rows, _ = measure(SMALL, CPU, small_clock())
    assert [row.operation for row in rows] == ["causal_conv1d"]
    lines = rows_of(capsys.readouterr().out)
    for name in ("rglru", "rglru + branch"):
        assert re.fullmatch(rf"{re.escape(name)} +skipped: needs .* GiB, .* GiB are free", lines[name][0])


class NoClock:
    def time(self, work: Callable[[], object]) -> tuple[float, object]:
        raise AssertionError("timed")


@pytest.mark.parametrize("wrong", ["y", "last_state", "gradient of x", "gradient of decay"])
def test_nothing_is_timed_that_differs(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = operations.Implementation.results

    def spoiled(side: operations.Implementation, inputs: operations.Inputs) -> operations.Tensors:
        found = results(side, inputs)
        if side.sets:  # not those of the reference
            found[wrong].view(-1)[-1] = float("nan") if wrong == "y" else found[wrong].abs().max() * 1.01 + 1e-2
        return found

    monkeypatch.setattr(operations.Implementation, "results", spoiled)
    monkeypatch.setattr(operations, "copy_bandwidth", lambda *_: 1e9)
    with pytest.raises(RuntimeError, match=rf"^rglru, R 5, T 12, B 2: {wrong} differs from .*; it was not timed$"):
        measure(SMALL, CPU, NoClock())  # type: ignore[arg-type]


def test_channels_that_are_compared_are_of_the_whole_width() -> None:
    """Errors in the first and the last channel are detected when only some channels are compared."""
    shape = Shape(width=3 * operations.CHANNELS, steps=3, batch=1)
    sets = make_inputs(CONV1D, shape, torch.float32, CPU)
    for channel in (0, shape.width - 1):

        def forward(leaves: operations.Tensors, channel: int = channel) -> operations.Tensors:
            y = CONV1D.run(leaves, "cpu", None)["y"]
            return {"y": y + torch.nn.functional.one_hot(torch.tensor(channel), shape.width)}

        with pytest.raises(RuntimeError, match="y differs"):
            check("shifted", operations.Implementation(forward, sets), CONV1D, sets[0])
    check("right", operations.Implementation(lambda leaves: CONV1D.run(leaves, "cpu", None), sets), CONV1D, sets[0])


def test_bfloat16_passes_its_check() -> None:
    sets = make_inputs(RGLRU, SHAPE, torch.bfloat16, CPU)
    check("rglru", our_implementation(RGLRU, sets, None), RGLRU, sets[0])


def test_sides_are_timed_in_turn_with_all_sets() -> None:
    calls: list[tuple[str, int]] = []
    sets = make_inputs(CONV1D, SHAPE, torch.float32, CPU)
    assert len(sets) == operations.SETS

    def side(name: str) -> operations.Implementation:
        def forward(leaves: operations.Tensors) -> operations.Tensors:
            calls.append((name, next(n for n, one in enumerate(sets) if one.leaves is leaves)))
            return CONV1D.run(leaves, "cpu", None)

        return operations.Implementation(forward, sets)

    class Counting:
        count = 0

        def time(self, work: Callable[[], object]) -> tuple[float, object]:
            Counting.count += 1
            return float(Counting.count), work()

    times = time_implementations(Counting(), {"a": side("a"), "b": side("b")}, repeats=3)  # type: ignore[arg-type]
    assert calls == [(name, number % operations.SETS) for number in range(operations.WARM_UP + 3) for name in "ab"]
    # A round has four measurements; the median is the fourth round.
    assert times == {"a": Times(13.0, 14.0), "b": Times(15.0, 16.0)}
    assert times["a"].total == 27.0


def test_copies_count_what_is_read_and_what_is_written() -> None:
    clock = SimpleNamespace(time=lambda work: (4.0, work()))
    assert copy_bandwidth(clock, CPU, 2**12, repeats=1) == pytest.approx(2 * 2**12 / 4e-3)  # type: ignore[arg-type]


def test_summary() -> None:
    rows = [
        row("rglru", Shape(4096, 2048, 8), 1.2),
        row("rglru", Shape(8192, 2048, 8), 1.3),
        row("rglru", Shape(512, 2048, 8), 1.5),
        row("rglru", Shape(512, 2048, 1), 9.0),
        row("rglru + branch", Shape(8192, 2048, 8), 5.0),
    ]
    ours = Times(1.0, 1.0)
    peer_rows = [
        PeerRow("one", Shape(512, 2048, 1), ours, Times(4.0, 5.0)),
        PeerRow("other", Shape(512, 2048, 8), ours, Times(3.0, 4.0)),
    ]
    assert summary(rows, peer_rows, "bfloat16")[1:] == [
        "time over the byte floor, B R >= 32768: 1.20 (R 4096, T 2048, B 8) to 1.30 (R 8192, T 2048, B 8); "
        "goal: at most 1.25",
        "time over the byte floor, B R >= 4096: 1.20 (R 4096, T 2048, B 8) to 1.50 (R 512, T 2048, B 8); "
        "goal: at most 1.60",
        "fastest peer, smallest of all shapes: 3.50 times our time (other; R 512, T 2048, B 8)",
    ]
    assert summary(rows[3:], [], "bfloat16")[1:] == [
        "time over the byte floor, B R >= 32768: not measured; goal: at most 1.25",
        "time over the byte floor, B R >= 4096: not measured; goal: at most 1.60",
        "fastest peer: not measured",
    ]


def test_plot(tmp_path: Path) -> None:
    from PIL import Image

    rows = [
        row(name, Shape(width, steps, batch), 1 + 2000 / (width * batch))
        for name in NAMES
        for width in (512, 2048, 8192)
        for steps in (2048, 32768)
        for batch in (1, 8)
    ]
    path = tmp_path / "shares.png"
    plot(rows, path, "a device, bfloat16")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as image:
        image.load()
        assert image.size == (1800, 576)
        colors = image.convert("RGB").getcolors(2**24)
    assert colors is not None
    assert len(colors) > 10  # something is drawn


def test_the_interpreter_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert main(["bench", "kernels"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The whole command, from arguments to summary and plot, with a fake device and fake times."""
    asked: list[tuple[Settings, torch.device]] = []

    def made_up(settings: Settings, device: torch.device) -> tuple[list[Row], list[PeerRow]]:
        asked.append((settings, device))
        return [row("rglru", Shape(8192, 2048, 8), 1.2)], []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(kernels, "measure", made_up)
    attended: list[tuple[torch.device, torch.dtype, int]] = []
    monkeypatch.setattr(kernels_attention, "measure_attention", lambda *given: attended.append(given))
    path = tmp_path / "shares.png"
    chosen = ["--widths", "512,64,512", "--batches", "4", "--chunk", "0", "--dtype", "float32", "--no-peers"]
    assert main(["bench", "kernels", *chosen, "--plot", str(path)]) == 0
    ((settings, device),) = asked
    assert device == torch.device("cuda", 3)
    assert settings == Settings(
        widths=(512, 64),
        lengths=(2048, 8192, 32768),
        batches=(4,),
        dtype="float32",
        repeats=20,
        chunk=0,
        peers=False,
    )
    assert attended == [(device, torch.float32, 20)]
    printed = capsys.readouterr().out
    heading = rf"\d{{4}}-\d\d-\d\d; a device; python .*, torch {re.escape(torch.__version__)}, triton "
    assert re.match(heading + re.escape(triton.__version__), printed)
    assert "B R >= 32768: 1.20 (R 8192, T 2048, B 8) to 1.20" in printed
    assert path.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_command_on_gpu(tmp_path: Path) -> None:
    plot_file = tmp_path / "shares.png"
    small = ["--widths", "64,512", "--lengths", "256", "--batches", "2", "--repeats", "3", "--plot", str(plot_file)]
    command = [sys.executable, "-m", "griffin.tools.cli", "bench", "kernels", *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert all(len(lines) == 2 for lines in rows_of(done.stdout).values()), done.stdout
    assert re.search(r"^  transformers' loop .* times our ", done.stdout, re.MULTILINE), done.stdout
    assert len(re.findall(r"^ +flex  .* ms .* ms +[\d,]+$", done.stdout, re.MULTILINE)) == len(kernels_attention.SHAPES)
    assert plot_file.read_bytes().startswith(b"\x89PNG")

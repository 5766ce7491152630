from __future__ import annotations

import dataclasses
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

from griffin.kernels.backends import ATTENTION_BACKENDS
from griffin.tools.bench.kernels import measure as measuring
from griffin.tools.bench.kernels import operations, rank_operations, recurrences, timing
from griffin.tools.bench.kernels.floors import Counted, counted
from griffin.tools.bench.kernels.measure import Measured, measure, measure_ranks, needed_bytes, sets_of_inputs
from griffin.tools.bench.kernels.operations import Operation, check, make_sets, our_implementation
from griffin.tools.bench.kernels.plot import plot
from griffin.tools.bench.kernels.rank_operations import RankShape
from griffin.tools.bench.kernels.recurrences import CONV1D, RGLRU, RGLRU_BRANCH, Shape
from griffin.tools.bench.kernels.rows import PeerRow, RankRow, Times, summary
from griffin.tools.bench.kernels.settings import Settings
from griffin.tools.bench.kernels.timing import copy_bandwidth, time_implementations
from griffin.tools.cli import main
from griffin.tools.common import plots
from griffin.trainer.settings.presets import preset
from tests.tools.bench.small_bench import CPU, RANK, SHAPE, SMALL, row, small_clock

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
        (["--models", "griffin-14b"], "--models griffin-14b: must be presets with tensor sizes"),
        (["--models", "griffin-15b/4"], "--models griffin-15b/4: must be presets with tensor sizes"),
        (["--models", "griffin-1.3b/0"], "--models griffin-1.3b/0: must be presets with tensor sizes"),
        (["--models", "recurrentgemma-2b/4"], "--models recurrentgemma-2b/4: 4 ranks cannot share heads 10"),
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
def test_floor_of_recurrences(operation: Operation, per_element: int) -> None:
    """All but parameters and states is a tensor [T, B, R], read or written once."""
    shape = Shape(512, 2048, 8)
    for dtype, size in ((torch.bfloat16, 1), (torch.float32, 2)):
        found = counted(operation, shape, dtype)
        assert found.flops == 0
        assert 1 <= found.bytes / (size * per_element * shape.elements) < 1.005


@pytest.mark.parametrize("operation", recurrences.OPERATIONS, ids=lambda operation: operation.name)
def test_memory_holds_all_tensors_of_a_pass(operation: Operation) -> None:
    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    shape, dtype = Shape(width=70, steps=40, batch=3), torch.float32
    sets = make_sets(operation, shape, dtype, CPU, sets_of_inputs(operation, shape, dtype))
    side = operations.Implementation(lambda inputs: operation.run(inputs, "cpu", None), sets)
    held = sum(one.bytes for one in sets) + size(list(side.results(sets[0]).values()))
    states = shape.elements * 4 if operation is RGLRU_BRANCH else 0  # kept between the passes
    assert held + states < needed_bytes(operation, shape, dtype)
    large = Shape(4096, 32768, 8)
    assert sets_of_inputs(operation, large, torch.bfloat16) == 1
    at_size = (held + states) / shape.elements / 4 * 2 * large.elements
    assert needed_bytes(operation, large, torch.bfloat16) < 1.3 * at_size


@pytest.mark.parametrize("operation", rank_operations.OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations_of_ranks_are_checked(operation: Operation, dtype: torch.dtype) -> None:
    if (refusal := operation.refuses(RANK, dtype, CPU)) is not None:
        assert operation.name in ("attention, flash", "attention, varlen", "attention, flex")
        assert "on cpu; accepted" in refusal
        return
    sets = make_sets(operation, RANK, dtype, CPU, 2)
    check(operation.name, our_implementation(operation, sets, None), operation, sets[0])

    def forward(inputs: operations.Arguments) -> operations.Tensors:
        found = operation.run(inputs, "triton", None)
        for total in inputs.values():
            if isinstance(total, Tensor) and total.dtype == torch.float32 and operation.name == "add_product":
                total.mul_(1.1)
        return {name: value * 1.1 for name, value in found.items()}

    with pytest.raises(RuntimeError, match=r"^wrong: .* differs"):
        check("wrong", operations.Implementation(forward, sets[1:]), operation, sets[1])


@pytest.mark.parametrize("name", ["griffin-14b/4", "recurrentgemma-2b/1"])
def test_floors_of_ranks(name: str) -> None:
    """What is stated beside the operators is what their definitions say: products, and tensors moved once."""
    model, tensor = preset(name.partition("/")[0]), int(name.partition("/")[2])
    shape = RankShape(name=name, model=model, tensor=tensor, steps=2048, batch=4)
    tokens, D, F, R, V = 8192, model.width, shape.mlp_width, shape.recurrent_width, shape.vocabulary
    found = {one.name: counted(one, shape, torch.bfloat16) for one in rank_operations.OPERATIONS}
    moved = {  # elements of bfloat16
        "rms_norm": tokens * (2 + 3) * D,
        "add_rms_norm": tokens * (4 + 4) * D,
        "gated_gelu": tokens * (3 + 5) * F,
        "rotary_qkv": tokens * 4 * (shape.heads + 2) * model.head_dim,
        "linear_scan": tokens * (3 + 5) * R,
    }
    for one, elements in moved.items():
        assert 1 <= found[one].bytes / (2 * elements) < 1.05, one  # parameters, and angles in float32
        assert found[one].flops == 0
    products = {
        "add_product": 2 * tokens * 2 * F * D,
        "recurrent_block": 3 * 2 * tokens * 2 * R * model.gate_block_width,
    }
    for one, flops in products.items():
        assert found[one].flops == flops, one
    three = 2 * tokens * V * D * 3
    recomputed = 4 / 3 if V > 100_000 else 1  # by tiles of the table, logits are computed again
    assert found["linear_cross_entropy"].flops == pytest.approx(three * recomputed)
    causal = 9 * 2 * tokens * shape.heads * model.head_dim * model.window  # at most, of 2 + 7 products
    for backend in ATTENTION_BACKENDS:
        assert 0.5 * causal < found[f"attention, {backend}"].flops < 1.2 * causal


def test_floor_is_the_longer_of_moving_and_computing() -> None:
    op = SimpleNamespace(bytes=4e9, flops=1e12)
    found = Counted(ops=(op, op), inputs=0, peak=0)  # type: ignore[arg-type]
    assert found.seconds(bandwidth=1e9, products=1e12) == 8
    assert found.seconds(bandwidth=1e9, products=1e11) == 20
    times = Times(10_000.0, 30_000.0)
    row = RankRow("one", times, found, bandwidth=1e9, products=1e11)
    assert (row.floor, row.over_floor) == (20_000, 2)
    assert "0.2" not in str(row)
    assert str(row).endswith("20000.000 ms      2.00 x")
    assert " -  " in str(RankRow("one", Times(1.0, 0.0), found, bandwidth=1e9, products=1e11))


def rows_of(printed: str, names: list[str]) -> dict[str, list[str]]:
    return {name: re.findall(rf"^{re.escape(name)}  .*$", printed, re.MULTILINE) for name in names}


NAMES = [operation.name for operation in recurrences.OPERATIONS]
RANK_NAMES = [operation.name for operation in rank_operations.OPERATIONS]


@pytest.mark.slow
def test_everything_is_checked_timed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    measured = measure(SMALL, CPU, small_clock())
    printed = capsys.readouterr().out
    assert [row.operation for row in measured.rows] == NAMES
    assert measured.peers == measured.ranks == []
    assert "R 5, T 12, B 2: as asked for" in printed  # the selector's reason
    for found_row, (line,) in zip(measured.rows, rows_of(printed, NAMES).values(), strict=True):
        number = r"([\d.,]+)"
        found = re.search(rf"{number} ms +{number} ms +{number} +{number} +{number} x$", line)
        assert found, line
        forward, backward, _, _, over = (float(word.replace(",", "")) for word in found.groups())
        milliseconds_at_the_floor = 1000 * found_row.floor_bytes / found_row.bandwidth
        # Times are printed to a microsecond.
        assert over == pytest.approx((forward + backward) / milliseconds_at_the_floor, rel=0.01, abs=0.01)
        assert ("2 chunks of 8" in line) == (found_row.operation != "causal_conv1d")


def test_operations_of_ranks_are_timed_and_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def side(operation: Operation, sets: list[operations.Inputs], chunk: int | None) -> operations.Implementation:
        return operations.Implementation(lambda inputs: operation.run(inputs, "cpu", chunk), sets)

    monkeypatch.setattr(operations, "our_implementation", side)  # Triton's interpreter is slow
    settings = dataclasses.replace(SMALL, ranks=(RANK,))
    found = Measured()
    measure_ranks(found, settings, CPU, small_clock(), bandwidth=1e9, products=1e9)
    rows = found.ranks
    printed = capsys.readouterr().out
    assert "small, tensor 2: T 12, B 2" in printed
    skipped = [f"attention, {backend}" for backend in ATTENTION_BACKENDS if backend != "sdpa"]
    assert [one.operation for one in rows] == [name for name in RANK_NAMES if name not in skipped]
    for name in skipped:
        assert re.search(rf"^{name} +skipped: backend: .* on cpu; accepted ", printed, re.MULTILINE)
    for one in rows:
        assert one.times.forward > 0
        assert (one.times.backward == 0) == (one.operation == "add_product")
        assert str(one) in printed.splitlines()


def test_what_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {operation.name: needed_bytes(operation, SHAPE, torch.float32) for operation in recurrences.OPERATIONS}
    assert needed["causal_conv1d"] < needed["rglru"] < needed["rglru + branch"]
    monkeypatch.setattr(timing, "free_bytes", lambda device: needed["causal_conv1d"])
    rows = measure(SMALL, CPU, small_clock()).rows
    assert [row.operation for row in rows] == ["causal_conv1d"]
    lines = rows_of(capsys.readouterr().out, NAMES)
    for name in ("rglru", "rglru + branch"):
        assert re.fullmatch(rf"{re.escape(name)} +skipped: needs .* GiB, .* GiB are free", lines[name][0])


class NoClock:
    def time(self, work: Callable[[], object]) -> tuple[float, object]:
        raise AssertionError("timed")


@pytest.mark.parametrize("wrong", ["y", "last_state", "gradient of x", "gradient of decay"])
def test_nothing_is_timed_that_differs(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = operations.Implementation.results

    def spoiled(side: operations.Implementation, inputs: operations.Inputs) -> operations.Tensors:
        found = results(side, inputs)
        if side.sets:  # not those of the reference
            found[wrong].view(-1)[-1] = float("nan") if wrong == "y" else found[wrong].abs().max() * 1.01 + 1e-2
        return found

    monkeypatch.setattr(operations.Implementation, "results", spoiled)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(timing, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(recurrences, "OPERATIONS", (RGLRU,))
    found = measure(SMALL, CPU, NoClock())  # type: ignore[arg-type]
    assert found.rows == []
    (failure,) = found.failures
    assert re.fullmatch(rf"rglru, R 5, T 12, B 2: {wrong} differs from .*; it was not timed", failure)
    assert failure in capsys.readouterr().out.splitlines()


def test_channels_that_are_compared_are_of_the_whole_width() -> None:
    """Errors in the first and the last channel are detected when only some channels are compared."""
    shape = Shape(width=3 * operations.CHANNELS, steps=3, batch=1)
    sets = make_sets(CONV1D, shape, torch.float32, CPU, 1)
    for channel in (0, shape.width - 1):

        def forward(inputs: operations.Arguments, channel: int = channel) -> operations.Tensors:
            y = CONV1D.run(inputs, "cpu", None)["y"]
            return {"y": y + torch.nn.functional.one_hot(torch.tensor(channel), shape.width)}

        with pytest.raises(RuntimeError, match="y differs"):
            check("shifted", operations.Implementation(forward, sets), CONV1D, sets[0])
    check("right", operations.Implementation(lambda inputs: CONV1D.run(inputs, "cpu", None), sets), CONV1D, sets[0])


def test_bfloat16_passes_its_check() -> None:
    sets = make_sets(RGLRU, SHAPE, torch.bfloat16, CPU, 1)
    check("rglru", our_implementation(RGLRU, sets, None), RGLRU, sets[0])


def test_sides_are_timed_in_turn_with_all_sets() -> None:
    calls: list[tuple[str, int]] = []
    assert sets_of_inputs(CONV1D, SHAPE, torch.float32) == measuring.SETS
    sets = make_sets(CONV1D, SHAPE, torch.float32, CPU, measuring.SETS)

    def side(name: str) -> operations.Implementation:
        def forward(inputs: operations.Arguments) -> operations.Tensors:
            calls.append((name, next(n for n, one in enumerate(sets) if one.leaves["x"] is inputs["x"])))
            return CONV1D.run(inputs, "cpu", None)

        return operations.Implementation(forward, sets)

    class Counting:
        count = 0

        def time(self, work: Callable[[], object]) -> tuple[float, object]:
            Counting.count += 1
            return float(Counting.count), work()

    times = time_implementations(Counting(), {"a": side("a"), "b": side("b")}, repeats=3)  # type: ignore[arg-type]
    assert calls == [(name, number % measuring.SETS) for number in range(timing.WARM_UP + 3) for name in "ab"]
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
    failures: list[str] = []

    def made_up(settings: Settings, device: torch.device) -> Measured:
        asked.append((settings, device))
        return Measured(rows=[row("rglru", Shape(8192, 2048, 8), 1.2)], failures=failures)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(measuring, "measure", made_up)
    path = tmp_path / "shares.png"
    chosen = ["--widths", "512,64,512", "--batches", "4", "--chunk", "0", "--dtype", "float32", "--no-peers"]
    chosen += ["--models", "griffin-14b/4"]
    assert main(["bench", "kernels", *chosen, "--plot", str(path)]) == 0
    ((settings, device),) = asked
    assert device == torch.device("cuda", 3)
    assert settings == Settings(
        widths=(512, 64),
        lengths=(2048, 8192, 32768),
        batches=(4,),
        ranks=(RankShape(name="griffin-14b", model=preset("griffin-14b"), tensor=4, steps=2048, batch=4),),
        dtype="float32",
        repeats=20,
        chunk=0,
        peers=False,
    )
    printed = capsys.readouterr().out
    heading = rf"\d{{4}}-\d\d-\d\d; a device; python .*, torch {re.escape(torch.__version__)}, triton "
    assert re.match(heading + re.escape(triton.__version__), printed)
    assert "B R >= 32768: 1.20 (R 8192, T 2048, B 8) to 1.20" in printed
    assert path.exists()
    failures.append("add_rms_norm differs")
    assert main(["bench", "kernels"]) == 1
    assert capsys.readouterr().err == "add_rms_norm differs\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_command_on_gpu(tmp_path: Path) -> None:
    plot_file = tmp_path / "shares.png"
    small = ["--widths", "64,512", "--lengths", "256", "--batches", "2", "--repeats", "3", "--plot", str(plot_file)]
    small += ["--models", "griffin-100m/1,griffin-100m/2"]
    command = [sys.executable, "-m", "griffin.tools.cli", "bench", "kernels", *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert all(len(lines) == 2 for lines in rows_of(done.stdout, NAMES).values()), done.stdout
    assert all(len(lines) == 2 for lines in rows_of(done.stdout, RANK_NAMES).values()), done.stdout
    assert re.search(r"^  transformers' loop .* times our ", done.stdout, re.MULTILINE), done.stdout
    assert plot_file.read_bytes().startswith(b"\x89PNG")

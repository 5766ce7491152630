from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from griffin.kernels.linear_scan import linear_scan
from griffin.tools.bench.kernels import measure as measuring
from griffin.tools.bench.kernels import operations, peers
from griffin.tools.bench.kernels.measure import measure
from griffin.tools.bench.kernels.operations import Operation, check, make_sets
from griffin.tools.bench.kernels.recurrences import RGLRU_FROM_ZERO, Shape
from griffin.tools.bench.kernels.settings import Settings
from tests.tools.bench.small_bench import CPU, SHAPE, SMALL, row, small_clock


def scan_btr(term: Tensor, log_a: Tensor) -> tuple[Tensor, None]:
    """A scan in the layout of flash-linear-attention: [B, T, R]."""
    return linear_scan(log_a.float().exp(), term.float(), batch_first=True, backend="cpu")[0].to(term.dtype), None


def scan_bct(a: Tensor, term: Tensor) -> Tensor:
    """A scan in the layout of accelerated-scan: [B, C, T], contiguous."""
    assert a.is_contiguous()
    assert term.is_contiguous()
    return linear_scan(a.permute(2, 0, 1), term.permute(2, 0, 1), backend="cpu")[0].permute(1, 2, 0).contiguous()


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install modules with the peers' interfaces; chunk_hgrn computes something else, and `scalar` fails."""

    def fail(a: Tensor, term: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory\nsecond line")

    fla = SimpleNamespace(fused_recurrent_hgrn=scan_btr, chunk_hgrn=lambda term, log_a: (term.cumsum(1), None))
    monkeypatch.setitem(sys.modules, "accelerated_scan.warp", SimpleNamespace(scan=scan_bct))
    monkeypatch.setitem(sys.modules, "accelerated_scan.scalar", SimpleNamespace(scan=fail))
    monkeypatch.setitem(sys.modules, "fla.ops.hgrn", fla)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_compute_what_we_compute(dtype: torch.dtype) -> None:
    """Outputs and all gradients agree in each peer's layout. The loop is transformers' own."""
    shape = Shape(width=5, steps=32, batch=2)
    sets = make_sets(RGLRU_FROM_ZERO, shape, dtype, CPU, 2)
    loaded, _ = peers.load_peers(shape.steps)
    wanted = ("accelerated-scan warp", "fla fused_recurrent_hgrn", "transformers' loop")
    right = [peer for peer in loaded if peer.name.startswith(wanted)]
    assert len(right) == 5  # two of them with eager and with compiled gates
    for peer in right:
        assert peer.refuses(shape) is None
        check(peer.name, peer.implementation(sets), RGLRU_FROM_ZERO, sets[0])


def measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure only peers; ours runs without Triton, whose interpreter is slow."""
    monkeypatch.setattr(
        measuring, "measure_recurrences", lambda measured, *_: measured.rows.append(row("rglru", SHAPE, 1.0))
    )

    def side(operation: Operation, sets: list[operations.Inputs], chunk: int | None) -> operations.Implementation:
        return operations.Implementation(lambda inputs: operation.run(inputs, "cpu", chunk), sets)

    monkeypatch.setattr(operations, "our_implementation", side)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.slow
def test_a_failing_peer_ends_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measured_before(monkeypatch)
    settings = Settings(**vars(SMALL) | {"peers": True})
    peer_rows = measure(settings, CPU, small_clock()).peers
    assert [row.peer for row in peer_rows] == [
        "fla fused_recurrent_hgrn, eager gates",
        "fla fused_recurrent_hgrn, compiled gates",
        "transformers' loop",
    ]
    printed = capsys.readouterr().out
    for gates in ("eager", "compiled"):
        for name, reason in {
            "accelerated-scan warp": "T 12 is not a power of two from 32 to 65536",
            "accelerated-scan scalar": "OutOfMemoryError: no memory",
            "fla chunk_hgrn": "DifferenceError: fla chunk_hgrn, .*: y differs .*",
        }.items():
            assert re.search(rf"^  {name}, {gates} gates: skipped \({reason}\)$", printed, re.MULTILINE), name
    assert "  torch associative_scan, compiled: skipped (" in printed  # it needs a GPU
    for peer_row in peer_rows:
        assert peer_row.ratio == pytest.approx(peer_row.theirs.total / peer_row.ours.total)
        assert re.search(rf"^  {peer_row.peer} .* {peer_row.ratio:.2f} times our ", printed, re.MULTILINE)


@pytest.mark.usefixtures("_stand_ins")
def test_no_peer_is_measured_on_a_broken_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_before(monkeypatch)
    monkeypatch.setattr(measuring, "device_works", lambda device: False)
    found = measure(Settings(**vars(SMALL) | {"peers": True}), CPU, small_clock())
    assert len(found.rows) == 1
    assert found.peers == []
    assert "the device no longer works after accelerated-scan warp" in capsys.readouterr().out


def test_limits_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("warp", "scalar"):
        monkeypatch.setitem(sys.modules, f"accelerated_scan.{module}", SimpleNamespace(scan=scan_bct))
    loaded = {peer.name: peer for peer in peers.load_peers(2048)[0]}
    warp, scalar = (loaded[f"accelerated-scan {module}, eager gates"] for module in ("warp", "scalar"))
    loop = loaded["transformers' loop"]
    for steps, refused in ((16, True), (32, False), (2048, False), (3000, True), (65536, False), (131072, True)):
        assert (warp.refuses(Shape(512, steps, 1)) is not None) == refused
        assert scalar.refuses(Shape(512, steps, 1)) is None
        assert (loop.refuses(Shape(512, steps, 1)) is not None) == (steps != 2048)
    for peer in (warp, scalar):
        assert peer.refuses(Shape(8192, 32768, 8)) == "2147483648 elements are more than its 32-bit index can address"


def test_peers_that_are_not_installed_are_named() -> None:
    loaded, reasons = peers.load_peers(2048)
    assert peers.installed().keys() == {"accelerated-scan", "flash-linear-attention", "transformers"}
    if peers.installed()["flash-linear-attention"] is None:
        assert reasons["fla chunk_hgrn"].startswith("ModuleNotFoundError: ")
    assert any(peer.name == "transformers' loop" for peer in loaded)

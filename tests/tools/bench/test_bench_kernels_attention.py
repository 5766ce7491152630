"""Attention in `griffin bench kernels`: every backend is checked and timed, or a line says why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from griffin.tools.bench import kernels_attention
from griffin.tools.bench.kernels_attention import AttentionRow, AttentionShape, measure_attention
from griffin.tools.bench.kernels_operations import Times
from tests.tools.bench.small_bench import CPU, small_clock

SMALL = AttentionShape(batch=2, heads=3, length=20, window=7, head_dim=8)


def test_what_can_run_is_timed_and_the_rest_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure_attention(CPU, torch.float32, 1, [SMALL], small_clock())
    assert [(row.backend, row.shape) for row in rows] == [("sdpa", SMALL)]
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    assert [name for name, _ in lines] == ["flash", "varlen", "flex", "sdpa"]
    assert all(text.startswith("skipped: backend: ") for name, text in lines[:3])
    assert lines[3][1] == str(rows[0]).split(maxsplit=1)[1]


@pytest.mark.parametrize("wrong", ["y", "gradient of k"])
def test_what_differs_from_float64_is_not_timed(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    attend = kernels_attention.multi_query_attention

    def spoiled(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
        y = attend(q, k, v, mask)  # type: ignore[arg-type]
        return 1.01 * y if wrong == "y" else y + 0.01 * (k - k.detach()).sum()

    monkeypatch.setattr(kernels_attention, "multi_query_attention", spoiled)
    with pytest.raises(RuntimeError, match=f"^attention with sdpa, B 2, .*: {wrong} differs from .* not timed$"):
        measure_attention(CPU, torch.float32, 1, [SMALL], small_clock())


def test_rate() -> None:
    """Of 20 queries the first 7 see 1 to 7 keys, the others 7."""
    scores = sum(range(1, 8)) + 13 * 7
    assert SMALL.flops == pytest.approx(2 * (2 + 5) * 2 * 3 * 8 * scores)
    row = AttentionRow("flex", AttentionShape(4, 10, 2048, 1024, 128), Times(1.0, 2.0))
    assert str(row).split()[-1] == f"{row.shape.flops / 3e-3 / 1e12:,.0f}"

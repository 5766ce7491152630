from __future__ import annotations

import re
from pathlib import Path

import pytest

from griffin.tools.bench.convert import require_equal, write_source
from griffin.tools.cli import main
from griffin.trainer.settings.presets import PRESETS
from tests.converted_models import GRIFFIN


def bench(*words: object) -> int:
    return main(["bench", "convert", *map(str, words), "--workers", "1"])


def test_all_sides_and_their_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "small", GRIFFIN)
    assert bench("--model", "small", "--blocks", 3, "--vocabulary", 100, "--rounds", 2, "--folder", tmp_path) == 0
    printed = capsys.readouterr().out
    times = {
        side: float(re.search(rf"^{side} +([\d.]+) ms +\d+ MB/s$", printed, re.MULTILINE)[1])  # type: ignore[index]
        for side in ("convert hf", "export hf", "copy")
    }
    for side in ("convert hf", "export hf"):
        (ratio,) = re.findall(
            rf"^{side} +ratio to copy +([\d.]+) +\(rounds: [\d.]+ to [\d.]+\)$", printed, re.MULTILINE
        )
        assert float(ratio) == pytest.approx(times["copy"] / times[side], abs=0.02, rel=0.1)
    assert not list(tmp_path.iterdir())


def test_nothing_is_timed_that_loses_a_bit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_source(tmp_path / name, GRIFFIN)
    paths = [tmp_path / name / "model.safetensors" for name in ("a", "b")]
    require_equal(*paths)
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match="differ from the converted ones"):
        require_equal(*paths)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", 0], "--rounds 0: must be at least 1"),
        (["--blocks", 27], "--blocks 27: must be at most the 26 of recurrentgemma-2b"),
        (["--model", "griffin-100m"], "model.logit_soft_cap = 0: must be above 0"),
        (["--folder", "/absent"], "--folder /absent: must be a folder"),
    ],
)
def test_refusals(words: list[object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*words) == 2
    assert message in capsys.readouterr().err

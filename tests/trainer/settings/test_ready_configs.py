"""The ready configurations of trainer/configs: they hold for what their first lines say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from griffin.tools.bench.count.rates import DEVICES
from griffin.tools.bench.count.step import count_step
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.validate import validate, validate_data
from tests.data_sets import write_prefix

CONFIGS = Path(__file__).parents[3] / "trainer/configs"

# By name: GPUs, and the kind of each.
GPUS = {
    "griffin-400m-1gpu": (1, "h100"),
    "griffin-1.3b-8gpu": (8, "h100"),
    "griffin-14b-h100-8x8": (64, "h100"),
    "griffin-14b-h200-8x8": (64, "h200"),
}


def test_all_are_covered() -> None:
    assert {file.stem for file in CONFIGS.glob("*.toml")} == {"demo", *GPUS}  # `make demo` runs that one


@pytest.mark.parametrize("name", GPUS)
def test_on_gpus(name: str, tmp_path: Path) -> None:
    """Memory and MFU in the comment are what is counted, and a tenth of what PyTorch can have is left."""
    path, (ranks, kind) = CONFIGS / f"{name}.toml", GPUS[name]
    prefix = write_prefix(tmp_path / "data", [[0] * 3000], vocabulary=256_000)
    config = load_config(path, [f"--data.train={prefix}", f"--data.eval={prefix}"])
    validate(config, ranks)
    validate_data(config)

    text = path.read_text()
    *terms, total = (float(figure) for figure in re.findall(r"^#.* (\d+\.\d)$", text, flags=re.MULTILINE))
    step = count_step(config, ranks, DEVICES[kind])
    counted = [step.static_bytes, max(rank.rank.peak for rank in step.ranks)]
    assert terms == pytest.approx([size / 1e9 for size in counted], abs=0.06)
    assert total == pytest.approx(sum(counted) / 1e9, abs=0.06)
    assert sum(counted) < 0.9 * DEVICES[kind].memory
    for mfu in re.findall(r"predicts ([\d.]+) % MFU", text):
        assert float(mfu) == pytest.approx(100 * step.mfu, abs=0.06)

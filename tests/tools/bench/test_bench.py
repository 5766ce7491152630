from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from griffin.tools.bench.step import require_equal
from griffin.tools.weights.hf.names import from_transformers, to_transformers, transformers_settings
from tests.converted_models import FIVE_BLOCKS
from tests.layouts import PATTERNS

ROOT = Path(__file__).parents[3]


def bench(*arguments: str, what: str = "step") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "griffin.tools.cli", "bench", what, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_step_prints_both_sides_and_their_ratio() -> None:
    done = bench("--sequence", "48", "--width", "64", "--repeats", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    for what in ("training step", "recurrent mixer"):
        times = {
            name: float(re.search(rf"^{what} +{name} +([\d.]+) ms +[\d,]+ tokens/s$", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
            for name in ("griffin", "transformers")
        }
        (ratio,) = re.findall(rf"^{what} +ratio +([\d.]+) +\(rounds: [\d.]+ to [\d.]+\)$", done.stdout, re.MULTILINE)
        # Times are printed to a tenth of a millisecond.
        assert float(ratio) == pytest.approx(times["transformers"] / times["griffin"], rel=0.1)


@pytest.mark.slow
def test_generate_prints_both_sides_and_their_ratio() -> None:
    sizes = ("--prompt", "5", "--tokens", "12", "--window", "8", "--width", "64", "--batch", "1", "3")
    done = bench(*sizes, "--repeats", "2", "--threads", "1", what="generate")
    assert done.returncode == 0, done.stderr
    for batch in ("1", "3"):
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith(f"batch {batch} ")]
        rates = {line[2]: float(line[5].replace(",", "")) for line in lines if line[-1] == "tokens/s"}
        (ratio,) = (float(line[3]) for line in lines if line[2] == "ratio")
        assert ratio == pytest.approx(rates["griffin"] / rates["transformers"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--width", "100"], "--width 100: must be a multiple of 64"),
    ],
)
@pytest.mark.parametrize("what", ["step", "generate"])
def test_refusals(arguments: list[str], expected: str, what: str) -> None:
    done = bench(*arguments, what=what)
    assert done.returncode == 2
    assert expected in done.stderr


def test_nothing_is_timed_that_differs() -> None:
    ones = torch.ones(3)
    require_equal("output", ones, ones + 1e-6)
    for other in (ones + 1e-3, torch.tensor([1.0, float("nan"), 1.0])):
        with pytest.raises(RuntimeError, match="the output differs"):
            require_equal("output", other, ones)


def test_names_round_trip() -> None:
    tensors = {
        "embedding.weight": torch.randn(5, 4),
        "blocks.11.recurrent.conv.weight": torch.randn(4, 6),
        "blocks.11.recurrent.conv.bias": torch.randn(6),
        "blocks.0.recurrent.decay": torch.randn(6),
        "blocks.0.recurrent.input_gate.weight": torch.randn(2, 3, 3),
        "blocks.2.attention.out.bias": torch.randn(4),
    }
    state = to_transformers(tensors)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "model.embed_tokens.weight": (5, 4),
        "model.layers.11.temporal_block.conv_1d.weight": (6, 1, 4),
        "model.layers.11.temporal_block.conv_1d.bias": (6,),
        "model.layers.0.temporal_block.rg_lru.recurrent_param": (6,),
        "model.layers.0.temporal_block.rg_lru.input_gate_weight": (2, 3, 3),
        "model.layers.2.temporal_block.o_proj.bias": (4,),
    }
    back = from_transformers(state, list(tensors))
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"gate_blocks": 2}, "model.gate_blocks = 2"),
        ({"logit_soft_cap": 0.0}, "model.logit_soft_cap"),
        ({"scale_embedding": False}, "model.scale_embedding"),
        ({"pattern": PATTERNS["mqa"]}, "model.pattern"),
    ],
)
def test_models_that_transformers_does_not_have(change: dict[str, object], setting: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=setting):
        transformers_settings(replace(FIVE_BLOCKS, **change))  # type: ignore[arg-type]

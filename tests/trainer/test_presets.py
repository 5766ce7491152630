from __future__ import annotations

import pytest

from griffin.parallel.config import ModelConfig
from griffin.trainer.presets import PRESETS, preset

SIZES = ("100m", "200m", "400m", "1.3b", "3b", "7b", "14b")


def counted(model: ModelConfig) -> tuple[int, int]:
    """(embedding, non-embedding) parameters, by the equations: every linear has a bias but q, k and v."""
    D, R, H, F = model.width, model.recurrent_width, model.attention_width, model.mlp_width
    recurrent = 2 * (D * R + R)  # x and y
    recurrent += 4 * R + R  # convolution
    recurrent += 2 * (R * R // model.gate_blocks + R) + R  # gates and decay
    recurrent += R * D + D  # out
    attention = D * H + 2 * D * model.head_dim + H * D + D
    mlp = 2 * (D * F + F) + F * D + D
    total = D  # final norm
    for mixer in model.pattern:
        total += 2 * D + mlp + (recurrent if mixer == "recurrent" else attention)
    return model.vocabulary * D, total


def test_every_preset_of_the_families() -> None:
    families = {f"{family}-{size}" for family in ("griffin", "hawk", "mqa") for size in SIZES}
    assert set(PRESETS) == families | {"recurrentgemma-2b", "recurrentgemma-9b"}


# Billions, rounded to two or three digits: hence the tolerance.
@pytest.mark.parametrize(
    ("size", "griffin", "hawk", "mqa"),
    [
        ("100m", 0.089, 0.094, 0.080),
        ("200m", 0.163, 0.174, 0.142),
        ("400m", 0.355, 0.375, 0.316),
        ("1.3b", 1.24, 1.30, 1.12),
        ("3b", 2.84, 3.00, 2.51),
        ("7b", 6.79, 7.18, 5.94),
        ("14b", 13.8, 14.8, 11.6),
    ],
)
def test_parameters_of_the_ladder(size: str, griffin: float, hawk: float, mqa: float) -> None:
    for family, expected in (("griffin", griffin), ("hawk", hawk), ("mqa", mqa)):
        assert counted(preset(f"{family}-{size}"))[1] / 1e9 == pytest.approx(expected, rel=0.006)


@pytest.mark.parametrize(
    ("name", "total"), [("recurrentgemma-2b", 2_682_862_080), ("recurrentgemma-9b", 8_579_977_216)]
)
def test_parameters_of_recurrent_gemma(name: str, total: int) -> None:
    model = preset(name)
    assert sum(counted(model)) == total
    assert (model.window, model.logit_soft_cap, model.scale_embedding) == (2048, 30.0, True)
    assert model.gate_blocks == model.heads


@pytest.mark.parametrize(("size", "recurrent", "attention"), [("100m", 8, 4), ("7b", 22, 10), ("14b", 27, 13)])
def test_patterns(size: str, recurrent: int, attention: int) -> None:
    griffin = preset(f"griffin-{size}").pattern
    assert griffin[:4] == ("recurrent", "recurrent", "attention", "recurrent")
    assert (griffin.count("recurrent"), griffin.count("attention")) == (recurrent, attention)
    assert set(preset(f"hawk-{size}").pattern) == {"recurrent"}
    assert set(preset(f"mqa-{size}").pattern) == {"global_attention"}
    assert len(preset(f"mqa-{size}").pattern) == len(griffin)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"model.preset = 'griffin-1b': no such preset; nearest: .*griffin-1.3b"):
        preset("griffin-1b")

"""The presets' settings; `tests/tools/test_model.py` counts their parameters."""

from __future__ import annotations

import pytest

from griffin.trainer.settings.presets import PRESETS, preset

SIZES = ("100m", "200m", "400m", "1.3b", "3b", "7b", "14b")


def test_every_preset_of_the_families() -> None:
    families = {f"{family}-{size}" for family in ("griffin", "hawk", "mqa") for size in SIZES}
    assert set(PRESETS) == families | {"recurrentgemma-2b", "recurrentgemma-9b"}


@pytest.mark.parametrize("name", ["recurrentgemma-2b", "recurrentgemma-9b"])
def test_recurrent_gemma(name: str) -> None:
    model = preset(name)
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

"""The spike detector."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from griffin.trainer.health.spikes import GRAD_NORM, LOSS, NOT_FINITE, SpikeDetector
from griffin.trainer.settings.sections import TrainConfig


def detector(**settings: Any) -> SpikeDetector:
    return SpikeDetector(TrainConfig(**{"spike": "skip"} | settings))


def test_noise_is_not_a_spike() -> None:
    """A falling loss with noise, and gradient norms that vary by a third: no spike in ten thousand steps."""
    found, draw = detector(), random.Random(0)
    for step in range(10_000):
        loss = 2.5 + 5 * math.exp(-step / 300) + draw.gauss(0, 0.03)
        assert found.detect(loss, math.exp(draw.gauss(-1, 0.3))) is None, step


def test_outlier_is_a_spike_and_does_not_join_the_window() -> None:
    found, draw = detector(), random.Random(0)

    def usual() -> tuple[float, float]:
        return 2.5 + draw.gauss(0, 0.03), math.exp(draw.gauss(-1, 0.3))

    for _ in range(200):
        assert found.detect(*usual()) is None
    for _ in range(60):  # however often it comes
        spike = found.detect(3.2, 0.4)
        assert spike is not None
        assert spike.kind == LOSS
        assert spike.text.startswith("loss 3.2000 is ")
        assert "above the median 2." in spike.text
        spike = found.detect(2.5, 50.0)
        assert spike is not None
        assert spike.kind == GRAD_NORM
        assert "gradient norm 50 is " in spike.text
    assert found.detect(1.0, 0.001) is None, "below the median is none"
    assert found.detect(*usual()) is None


def test_only_non_finite_values_are_spikes_before_half_a_window() -> None:
    found = detector(spike_window=10)
    for _ in range(4):
        assert found.detect(1.0, 1.0) is None
    for loss, grad_norm in ((math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)):
        spike = found.detect(loss, grad_norm)
        assert spike is not None
        assert spike.kind == NOT_FINITE
    assert found.detect(100.0, 1.0) is None
    assert found.detect(100.0, 1.0) is not None


def test_equal_values_tolerate_rounding() -> None:
    found = detector(spike_window=8, spike_deviations=2)
    for _ in range(8):
        assert found.detect(2.0, 1.0) is None
    assert found.detect(2.0 * (1 + 2 * 0.005 * 0.99), math.exp(2 * 0.02 * 0.99)) is None
    assert found.detect(2.0 * (1 + 2 * 0.005 * 1.01), 1.0) is not None
    assert found.detect(2.0, math.exp(2 * 0.02 * 1.02)) is not None


def test_a_limited_number_within_a_window() -> None:
    found = detector(spike_limit=2, spike_window=8)
    assert [found.is_too_many(step) for step in (1, 6, 10, 13)] == [False, False, False, True]


def test_repeated_step_counts_again() -> None:
    found = detector(spike_limit=3, spike_window=8)
    assert [found.is_too_many(step) for step in (50, 30, 50, 50, 50)] == [False, False, False, False, True]


def test_restored_detector_continues_exactly() -> None:
    draw = random.Random(1)
    values = [(2 + draw.gauss(0, 0.1) + 5 * (n % 17 == 16), 1.0) for n in range(100)]
    whole, first = detector(spike_window=16), detector(spike_window=16)
    judged = [whole.detect(*value) for value in values]
    for step, value in enumerate(values[:50]):
        if first.detect(*value) is not None:
            first.is_too_many(step)
            first.skipped += 1
    second = detector(spike_window=16)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    assert [second.detect(*value) for value in values[50:]] == judged[50:]
    assert any(judged[50:])
    second.rewinds = 1
    second.restore(first.state(), values_only=True)
    assert second.state() == first.state() | {"rewinds": 1}

from __future__ import annotations

import math

import pytest
import torch

from griffin.trainer.measuring.rglru_health import BINS, FIRST_OCTAVE, LAST_OCTAVE, Health, LayerHealth, distribution

BIN = 2 ** (1 / 16)


def layer(row: torch.Tensor) -> LayerHealth:
    return LayerHealth(counts=row[:BINS], sums=row[BINS:])


def random_gates() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gates = 3 * torch.randn(2, 50, 3, 40, generator=generator)
    return gates[0], gates[1], torch.randn(40, generator=generator) - 4


def test_distributions_are_those_of_the_definition() -> None:
    input_gate, recurrence_gate, p = random_gates()
    values = layer(distribution(input_gate, recurrence_gate, p)).values()
    r, i = recurrence_gate.double().sigmoid(), input_gate.double().sigmoid()
    a = torch.exp(-8 * r * torch.nn.functional.softplus(p.double()))
    assert values["decay_mean"] == pytest.approx(a.mean().item(), rel=1e-6)
    for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        expected = (-1 / a.log()).quantile(share).item()
        assert expected / BIN < values[f"memory_{name}"] < expected * BIN
        # exp(-1 / m), by which a bin is narrower where a is near 1.
        assert math.exp(-BIN / expected) < values[f"decay_{name}"] < math.exp(-1 / BIN / expected)
    for name, gate in (("input_gate", i), ("recurrence_gate", r)):
        assert values[f"{name}_closed"] == pytest.approx((gate < 0.01).double().mean().item(), abs=1e-9)
        assert values[f"{name}_open"] == pytest.approx((gate > 0.99).double().mean().item(), abs=1e-9)
        assert values[f"{name}_open"] > 0.01, "the sample has some"


def test_extreme_gates_are_counted_at_the_ends() -> None:
    gates = torch.tensor([-200.0, -30.0, 200.0]).view(3, 1, 1)
    row = distribution(gates, gates, torch.tensor([90.0]))
    assert row[:BINS].sum() == 3
    assert torch.isfinite(row).all()
    values = layer(row).values()
    assert all(math.isfinite(value) for value in values.values())
    assert values["memory_p95"] > 2 ** (LAST_OCTAVE - 1)
    assert values["memory_p05"] < 2 ** (FIRST_OCTAVE + 1)
    assert values["recurrence_gate_closed"] == pytest.approx(2 / 3)
    assert values["input_gate_open"] == pytest.approx(1 / 3)


def test_nan_does_not_end_the_step() -> None:
    """The step itself ends the run, naming the parameter, or is skipped."""
    gates = torch.tensor([0.0, math.nan, math.inf, -math.inf]).view(4, 1, 1)
    for input_gate, recurrence_gate, p in (
        (gates, gates, torch.zeros(1)),
        (gates, gates * 0, torch.tensor([math.nan])),
    ):
        assert distribution(input_gate, recurrence_gate, p)[:BINS].sum() == 4


def test_parts_of_channels_add_up() -> None:
    input_gate, recurrence_gate, p = random_gates()
    whole = distribution(input_gate, recurrence_gate, p)
    halves = [
        distribution(input_gate[..., part], recurrence_gate[..., part], p[part])
        for part in (slice(25), slice(25, None))
    ]
    torch.testing.assert_close(sum(halves), whole)


def test_observed_tokens_are_evenly_spaced() -> None:
    input_gate, recurrence_gate, p = random_gates()
    some = distribution(input_gate, recurrence_gate, p, every=5)
    torch.testing.assert_close(some, distribution(input_gate[::5], recurrence_gate[::5], p))
    assert some[:BINS].sum() == 10 * 3 * 40


def test_all_layers_are_counted_together() -> None:
    rows = [distribution(gate, gate, p) for gate, _, p in (random_gates(),) for gate in (gate, gate - 2)]
    health = Health(layers={0: layer(rows[0]), 7: layer(rows[1])})
    values = health.values()
    assert {name.split("/")[2] for name in values} == {"all", "layer-00", "layer-07"}
    means = [values[f"rglru/decay_mean/{name}"] for name in ("layer-00", "layer-07")]
    assert values["rglru/decay_mean/all"] == pytest.approx(sum(means) / 2)
    ends, counts = health.layers[0].histogram()
    assert sum(counts) == health.layers[0].counts.sum()
    assert ends[-1] == LAST_OCTAVE


def test_no_observation_gives_no_figures() -> None:
    empty = torch.zeros(BINS + 5, dtype=torch.float64)
    assert Health(layers={0: layer(empty)}).values() == {}

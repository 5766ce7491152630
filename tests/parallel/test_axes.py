"""Coordinates of ranks and layouts, without processes; `test_grid.py` compares with megatron-core's groups."""

from __future__ import annotations

import pytest
import torch
from megatron.core.parallel_state import RankGenerator

from griffin.parallel.config import AXES, Axis, ParallelConfig
from griffin.parallel.world import axes as axes_module
from griffin.parallel.world.axes import Axes


def test_coordinates_and_ranks_are_the_inverse_of_each_other() -> None:
    axes = Axes.of(tensor=2, data=3, pipeline=4)
    assert axes.world_size == 24
    found = [{axis.name: axes.coordinate(rank, axis.name) for axis in AXES} for rank in range(24)]
    assert [axes.ranks(**place) for place in found] == [[rank] for rank in range(24)]
    assert found[1] == {"tensor": 1, "data": 0, "pipeline": 0}
    assert found[2] == {"tensor": 0, "data": 1, "pipeline": 0}
    assert axes.ranks(pipeline=1) == list(range(6, 12))
    assert axes.ranks(pipeline=1, tensor=1) == [7, 9, 11]


def test_values_along_an_axis() -> None:
    axes = Axes.of(tensor=2, data=3, pipeline=4)
    for axis in (known.name for known in AXES):
        rows = axes.along(axis, torch.arange(24))
        assert rows.shape == (axes.size(axis), 24 // axes.size(axis))
        for place, row in enumerate(rows.tolist()):
            assert {axes.coordinate(rank, axis) for rank in row} == {place}


def test_the_layout_of_a_world() -> None:
    layout = ParallelConfig(tensor=2, pipeline=3, sequence_parallel=True, stages=(1, 1, 1))
    assert Axes.of_layout(layout, 24) == Axes.of(tensor=2, data=4, pipeline=3)
    assert layout.model_ranks == 6
    assert list(layout.record(24).items()) == [
        ("tensor", 2),
        ("pipeline", 3),
        ("virtual_pipeline", 1),
        ("sequence_parallel", True),
        ("data", 4),
    ]


def test_an_added_axis_is_numbered_as_megatron_core_does(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Axis(name="context", size_argument="context_parallel_size", shards_tokens=True)
    monkeypatch.setattr(axes_module, "AXES", (AXES[0], context, *AXES[1:]))
    axes = Axes.of(tensor=2, context=3, data=2, pipeline=2)
    generator = RankGenerator(tp=2, cp=3, ep=1, dp=2, pp=2, order="tp-cp-ep-dp-pp")
    names = {"tp": "tensor", "cp": "context", "dp": "data", "pp": "pipeline"}
    for short, name in names.items():
        for group in generator.get_ranks(short):
            assert [axes.coordinate(rank, name) for rank in group] == list(range(axes.size(name)))
    assert axes.replicas == 6
    for group in generator.get_ranks("dp-cp"):  # of these, each updates a shard of the optimizer
        assert [axes.replica(rank) for rank in group] == list(range(6))
    for pipeline in range(2):
        for tensor in range(2):
            assert axes.ranks(pipeline=pipeline, tensor=tensor) in generator.get_ranks("dp-cp")

"""Coordinates of ranks that are not there; `test_grid.py` compares with megatron-core's."""

from __future__ import annotations

import torch

from griffin.parallel.world.axes import AXES, Axes


def test_coordinates_and_ranks_are_the_inverse_of_each_other() -> None:
    axes = Axes.of(tensor=2, data=3, pipeline=4)
    assert axes.world_size == 24
    found = [{axis: axes.coordinate(rank, axis) for axis in AXES} for rank in range(24)]
    assert [axes.rank(**place) for place in found] == list(range(24))
    assert found[1] == {"tensor": 1, "data": 0, "pipeline": 0}
    assert found[2] == {"tensor": 0, "data": 1, "pipeline": 0}
    assert axes.rank(pipeline=1) == 6


def test_values_along_an_axis() -> None:
    axes = Axes.of(tensor=2, data=3, pipeline=4)
    for axis in AXES:
        rows = axes.along(axis, torch.arange(24))
        assert rows.shape == (axes.size(axis), 24 // axes.size(axis))
        for place, row in enumerate(rows.tolist()):
            assert {axes.coordinate(rank, axis) for rank in row} == {place}

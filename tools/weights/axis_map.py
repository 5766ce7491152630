"""Maps between the axes of canonical tensors and of foreign ones, which may be transposed, stacked or expanded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from griffin.trainer.checkpoint.arrays import Box


@dataclass(frozen=True)
class ExtraAxis:
    """An axis of `size` that only the foreign tensor has; the canonical tensor is its slice at `index`."""

    size: int = 1
    index: int = 0


@dataclass(frozen=True)
class AxisMap:
    """For each axis of a foreign tensor, in its order: the canonical axis, or an `ExtraAxis`."""

    axes: tuple[int | ExtraAxis, ...]

    @property
    def canonical_axes(self) -> list[int]:
        """The canonical axes in the foreign order."""
        return [axis for axis in self.axes if isinstance(axis, int)]

    def foreign_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the foreign tensor's shape for a canonical one."""
        return tuple(shape[axis] if isinstance(axis, int) else axis.size for axis in self.axes)

    def foreign_box(self, box: Box) -> Box:
        """Return the place of a canonical box in the foreign tensor."""
        return tuple(box[axis] if isinstance(axis, int) else slice(axis.index, axis.index + 1) for axis in self.axes)

    def canonical_box(self, foreign: Box) -> Box:
        """Return the place of a foreign box, which has extra axes as a whole, in the canonical tensor."""
        return tuple(foreign[self.axes.index(axis)] for axis in range(len(self.canonical_axes)))

    def to_canonical(self, values: np.ndarray) -> np.ndarray:
        """View values of `foreign_box(box)` as values of `box`."""
        extra = tuple(place for place, axis in enumerate(self.axes) if isinstance(axis, ExtraAxis))
        return values.squeeze(extra).transpose(np.argsort(self.canonical_axes))

    def to_foreign(self, values: np.ndarray) -> np.ndarray:
        """View values of `canonical_box(foreign)` as values of `foreign`."""
        extra = [place for place, axis in enumerate(self.axes) if isinstance(axis, ExtraAxis)]
        return np.expand_dims(values.transpose(self.canonical_axes), extra)


def identity_axes(dimensions: int) -> AxisMap:
    """Return the map for a tensor that has the same axes in both."""
    return AxisMap(tuple(range(dimensions)))

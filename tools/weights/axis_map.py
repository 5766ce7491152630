"""Where the dimensions of this project's tensors lie in those of other formats: transposed, unstacked, reshaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from griffin.trainer.checkpoint.arrays import Box


@dataclass(frozen=True)
class ExtraAxis:
    """A dimension of the foreign tensor that ours does not have: of `size`, of which ours is what is at `index`."""

    size: int = 1
    index: int = 0


@dataclass(frozen=True)
class AxisMap:
    """Each dimension of a foreign tensor, in its order: a dimension of ours, or `ExtraAxis`."""

    places: tuple[int | ExtraAxis, ...]

    @property
    def kept(self) -> list[int]:
        return [place for place in self.places if isinstance(place, int)]

    def foreign_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The foreign tensor's shape, for ours."""
        return tuple(shape[place] if isinstance(place, int) else place.size for place in self.places)

    def foreign_box(self, box: Box) -> Box:
        """Where a box of ours lies in the foreign tensor."""
        return tuple(
            box[place] if isinstance(place, int) else slice(place.index, place.index + 1) for place in self.places
        )

    def box(self, foreign: Box) -> Box:
        """Where a box of the foreign tensor, in which fixed dimensions are whole, lies in ours."""
        return tuple(foreign[self.places.index(axis)] for axis in range(len(self.kept)))

    def ours(self, values: np.ndarray) -> np.ndarray:
        """Values of `foreign_box(box)` as those of `box`: a view."""
        fixed = tuple(axis for axis, place in enumerate(self.places) if isinstance(place, ExtraAxis))
        return values.squeeze(fixed).transpose(np.argsort(self.kept))

    def foreign(self, values: np.ndarray) -> np.ndarray:
        """Values of `box(foreign)` as those of `foreign`: a view."""
        fixed = [axis for axis, place in enumerate(self.places) if isinstance(place, ExtraAxis)]
        return np.expand_dims(values.transpose(self.kept), fixed)


def identity_axes(dimensions: int) -> AxisMap:
    """Of a tensor that both have alike."""
    return AxisMap(tuple(range(dimensions)))

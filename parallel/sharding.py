"""How every parameter is cut over tensor-parallel ranks, and what it is called whatever the layout."""

from __future__ import annotations

import math

# Divisible by every tensor-parallel size up to 8 and by 10, 12, 14, 15, 16, 20, 32, 64.
MOST_ATOMS = 6720


def axis_atoms(size: int) -> int:
    """Number of equal atoms that an MLP or vocabulary axis of `size` is cut into; a tensor-parallel size divides it."""
    return math.gcd(size, MOST_ATOMS)

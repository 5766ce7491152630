"""Comparing dictionaries of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_all_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """The same names with close tensors; `atol` 0 and `rtol` 0 are bitwise equality up to the sign of zero."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        try:
            torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None

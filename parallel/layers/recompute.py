"""Activations that the backward pass computes again, where that costs no matrix product, instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(y: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Return y, in whose place a product that is `saving` it keeps `compute`, which must return the same bits.

    What `compute` refers to is kept with it, so it is to use only tensors that are kept anyway, and not y.
    """
    y.recompute = compute  # type: ignore[attr-defined]
    return y


@contextmanager
def saving(x: Tensor) -> Iterator[None]:
    """Context of an operator that saves its input x, and nothing else, for its backward pass."""
    compute: Callable[[], Tensor] | None = getattr(x, "recompute", None)
    if compute is None:
        yield
        return
    shape = x.shape

    def pack(saved: Tensor) -> Callable[[], Tensor]:
        assert saved.shape == shape, "another tensor than the input is saved"
        return compute

    with saved_tensors_hooks(pack, lambda compute: compute()):
        yield

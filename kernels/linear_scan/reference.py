"""Reference diagonal linear recurrence: a loop over time that the other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype


def linear_scan_reference(
    a: Tensor, b: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return h and the last state of time-major tensors, differentiated by autograd; see `linear_scan`.

    Arithmetic is float32, or float64 if b is.
    """
    dtype = accumulation_dtype(b)
    h = b.new_zeros(b.shape[1:], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    a = a.to(dtype)
    if starts is not None:
        a = a.masked_fill(starts[..., None], 0)
    states = []
    for t, (a_t, b_t) in enumerate(zip(a, b.to(dtype), strict=True)):
        # Without starts and initial state, position 0 starts a document.
        h = b_t if t == 0 and starts is None and initial_state is None else a_t * h + b_t
        states.append(h)
    return torch.stack(states).to(b.dtype), h

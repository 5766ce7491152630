"""A diagonal linear recurrence as a loop over time: the definition that every faster path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.layout import accumulation_dtype


def linear_scan_reference(
    a: Tensor, b: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h of time-major tensors, differentiated by autograd; arguments as `griffin.kernels.linear_scan.linear_scan`.

    Arithmetic is float32, or float64 where b is.
    """
    dtype = accumulation_dtype(b)
    h = b.new_zeros(b.shape[1:], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    states = []
    for t, (a_t, b_t) in enumerate(zip(a.to(dtype), b.to(dtype), strict=True)):
        if starts is not None:
            h = torch.where(starts[t, :, None], 0, a_t * h)
        elif t > 0 or initial_state is not None:
            h = a_t * h
        h = h + b_t
        states.append(h)
    return torch.stack(states).to(b.dtype), h

"""Causal depthwise temporal convolution of the recurrent block, confined to each document."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.arguments import FLOATING, check_argument, check_sequences
from griffin.kernels.backends import AUTO
from griffin.kernels.conv1d import ops
from griffin.kernels.conv1d.reference import causal_conv1d_reference
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.selection import resolve_backend

__all__ = ["causal_conv1d"]

TRITON_WIDTH = 4


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    starts: Tensor | None = None,
    initial_window: Tensor | None = None,
    batch_first: bool = False,
    backend: str = AUTO,
) -> Tensor:
    """Causal depthwise convolution of packed sequences (arXiv 2402.19427, section 2.4).

        y_t = bias + sum_j weight[K - 1 - j] x_{t-j}, over the j in 0 .. K - 1 for which t - j is in t's document

    Sums are float32, or float64 if x is. Gradients flow to x, weight, bias and initial_window. Results are bitwise
    reproducible.

    Args:
        x: [T, B, R], floating point, with any strides.
        weight: [K, R], floating point; the last row multiplies the current token, the first the one K - 1 steps back.
        bias: [R], floating point.
        starts: [T, B] bool, True at each document's first token; None: each sequence is one document. A sequence whose
            position 0 is not a start continues from `initial_window`.
        initial_window: [K - 1, B, R], floating point; the inputs before position 0, oldest first. None: zeros.
        batch_first: x, `starts`, `initial_window` and y have the batch axis before the time axis.
        backend: "reference" (a loop, differentiated by autograd), "cpu", "triton" (width 4 only), or "auto", which
            selects by `griffin.kernels.selection.select_backend`.

    Returns:
        y, with the shape and dtype of x.

    Raises:
        NotImplementedError: forward-mode differentiation with a backend other than "reference".
        ValueError: the shape, dtype or device of an argument does not match x, or the backend is unknown or cannot run.
    """
    check_sequences("x", x)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: shape {list(weight.shape)}; accepted: [K, R], K >= 1")
    batch, width, before = x.shape[0 if batch_first else 1], x.shape[2], len(weight) - 1
    for name, tensor, shape, dtypes in (
        ("weight", weight, (len(weight), width), FLOATING),
        ("bias", bias, (width,), FLOATING),
        ("starts", starts, x.shape[:2], (torch.bool,)),
        ("initial_window", initial_window, (batch, before, width) if batch_first else (before, batch, width), FLOATING),
    ):
        check_argument(name, tensor, shape, dtypes, "x", x)
    if backend == AUTO and len(weight) != TRITON_WIDTH:
        backend = "cpu"
    backend = resolve_backend(backend, x.device, x.dtype)
    if backend == "triton" and len(weight) != TRITON_WIDTH:
        raise ValueError(f"weight: {len(weight)} taps; backend 'triton' has {TRITON_WIDTH}, the others any number")
    if batch_first:
        x = x.transpose(0, 1)
        starts, initial_window = (None if t is None else t.transpose(0, 1) for t in (starts, initial_window))
    if backend == "reference":
        y = causal_conv1d_reference(x, weight, bias, starts, initial_window)
    else:
        x, weight, bias, initial_window = without_tangents(x, weight, bias, initial_window)
        y = ops.forward(x, weight, bias, starts, initial_window, None, backend)
    return y.transpose(0, 1) if batch_first else y

"""Diagonal linear recurrence with arbitrary coefficients and inputs, for recurrent mixers."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.arguments import FLOATING, check_argument, check_chunk, check_sequences
from griffin.kernels.backends import AUTO
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.linear_scan import ops
from griffin.kernels.linear_scan.reference import linear_scan_reference
from griffin.kernels.selection import resolve_backend

__all__ = ["linear_scan"]


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    batch_first: bool = False,
    backend: str = AUTO,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute h_t = a_t h_{t-1} + b_t per channel. At a document's first token a is replaced by 0.

    A non-finite state stays non-finite, also across a document's start, because 0 times it is NaN.

    States and sums are float32, or float64 if b is; h is rounded once. Gradients flow to a, b and initial_state, from
    both results. Results are bitwise reproducible.

    Backend "cpu" is finite wherever the loop is, also if products of a overflow. With u = 2^-24 (2^-53 in float64), the
    error of a state is within about 4 L u of the sum of its terms' absolute values, where the chunk length L is at most
    256 steps on CPUs; rounding errors do not accumulate over more steps, as they do in a loop. With more than 4096
    channels of a batch there are no chunks, and it is a loop. Triton's chunks are chained by products of a in float64.

    Args:
        a, b: [T, B, R], with any strides, of one dtype: bfloat16, float16, float32 or float64. Tensors with contiguous
            channels are not copied.
        starts: [T, B] bool, True at each document's first token. None: each sequence is one document, which starts at
            position 0 unless `initial_state` is passed. Otherwise a position 0 that is not a start continues from
            `initial_state`, or from a zero state without one.
        initial_state: [B, R], floating point; the state before position 0.
        batch_first: a, b, `starts` and h have the batch axis before the time axis.
        backend: "reference" (a loop, differentiated by autograd), "cpu", "triton", or "auto", which
            selects by `griffin.kernels.selection.select_backend`.
        chunk: steps of time per Triton program; see `griffin.kernels.recurrence.plan.select_plan`. 0 is one chunk, a
            plain loop: set it if states grow over a chunk and cancel, or overflow only when started from a zero state.

    Returns:
        h, with the shape and dtype of b, and the state after the last position, [B, R] in float32 (float64 if b is).

    Raises:
        NotImplementedError: forward-mode differentiation with a backend other than "reference".
        ValueError: the shape, dtype or device of an argument does not match b, or the backend is unknown or cannot run.
    """
    check_sequences("b", b)
    batch, width = b.shape[0 if batch_first else 1], b.shape[2]
    for name, tensor, shape, dtypes in (
        ("a", a, b.shape, (b.dtype,)),
        ("starts", starts, b.shape[:2], (torch.bool,)),
        ("initial_state", initial_state, (batch, width), FLOATING),
    ):
        check_argument(name, tensor, shape, dtypes, "b", b)
    check_chunk(chunk)
    backend = resolve_backend(backend, b.device, b.dtype)
    if batch_first:
        a, b = a.transpose(0, 1), b.transpose(0, 1)
        starts = None if starts is None else starts.transpose(0, 1)
    if backend == "reference":
        h, last_state = linear_scan_reference(a, b, starts, initial_state)
    else:
        a, b, initial_state = without_tangents(a, b, initial_state)
        h, last_state = ops.forward(a, b, starts, initial_state, chunk, backend)
    return h.transpose(0, 1) if batch_first else h, last_state

"""The real-gated linear recurrent unit (RG-LRU), the recurrence of Griffin and Hawk."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.rglru.cpu import rglru_cpu
from griffin.kernels.rglru.reference import rglru_reference

__all__ = ["BACKENDS", "rglru", "select_backend"]

BACKENDS = {"reference": rglru_reference, "cpu": rglru_cpu}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def select_backend(device: torch.device) -> str:
    """The backend that `backend="auto"` uses for tensors on `device`: "cpu" everywhere, as it runs on any device."""
    return "cpu"


def rglru(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    decay: Tensor,
    *,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    batch_first: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RG-LRU of packed sequences (arXiv 2402.19427, section 2.4, equations 1-4).

        r = sigmoid(recurrence_gate)        i = sigmoid(input_gate)
        log a = -8 r softplus(decay)        m = sqrt(1 - a^2)
        h_t = a_t h_{t-1} + m_t (i_t x_t)   y = h

    At a document's first token a = 0 and m = 1. The derivative of the square root is bounded: 1 / sqrt(max(4 u, 1e-6)).
    States and sums are float32, or float64 where x is. Gradients flow to x, both gates, decay and initial_state, from
    both results.

    Args:
        x: [T, B, R], of any strides; bfloat16, float16, float32 or float64.
        input_gate, recurrence_gate: the gates before their sigmoid, bias included; shape and dtype of x.
        decay: [R], floating point; the negative of the paper's Lambda.
        starts: [T, B] bool, True at each document's first token. None: each sequence is one document, which begins at
            position 0 unless `initial_state` is given. Given: a position 0 that is no start and has no `initial_state`
            continues from a zero state.
        initial_state: [B, R], floating point; the state before position 0.
        batch_first: x, the gates, `starts` and y have the batch axis before the time axis.
        backend: one of `BACKENDS`, or "auto" for what `select_backend` says.

    Returns:
        y, with shape and dtype of x, and the state after the last position, [B, R] in float32 (float64 where x is).

    Raises:
        ValueError: an argument's shape, dtype or device does not fit x, or the backend is unknown.
    """
    _check(x, input_gate, recurrence_gate, decay, starts, initial_state, batch_first)
    if backend == "auto":
        backend = select_backend(x.device)
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; accepted: 'auto', {', '.join(map(repr, BACKENDS))}")
    if not batch_first:
        return BACKENDS[backend](x, input_gate, recurrence_gate, decay, starts, initial_state)
    x, input_gate, recurrence_gate = (tensor.transpose(0, 1) for tensor in (x, input_gate, recurrence_gate))
    starts = None if starts is None else starts.transpose(0, 1)
    y, final_state = BACKENDS[backend](x, input_gate, recurrence_gate, decay, starts, initial_state)
    return y.transpose(0, 1), final_state


def _check(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    batch_first: bool,
) -> None:
    if x.ndim != 3 or x.numel() == 0:
        raise ValueError(f"x: shape {list(x.shape)}; accepted: three axes, none empty")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: {x.dtype}; accepted: {', '.join(map(str, DTYPES))}")
    batch, width = x.shape[0 if batch_first else 1], x.shape[2]
    floating = ("a floating-point dtype", DTYPES)
    expected: list[tuple[str, Tensor | None, tuple[int, ...], tuple[str, tuple[torch.dtype, ...]]]] = [
        ("input_gate", input_gate, tuple(x.shape), ("the dtype of x", (x.dtype,))),
        ("recurrence_gate", recurrence_gate, tuple(x.shape), ("the dtype of x", (x.dtype,))),
        ("decay", decay, (width,), floating),
        ("starts", starts, tuple(x.shape[:2]), ("torch.bool", (torch.bool,))),
        ("initial_state", initial_state, (batch, width), floating),
    ]
    for name, tensor, shape, (accepted, dtypes) in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}; x of shape {list(x.shape)} needs {list(shape)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: {tensor.dtype}; accepted: {accepted} (x is {x.dtype})")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}; x is on {x.device}")

"""The recurrent block between its linears: convolution, gates, recurrence and the product with the GeLU branch."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.kernels.arguments import FLOATING, check_argument, check_sequences
from griffin.kernels.backends import AUTO
from griffin.kernels.conv1d import TRITON_WIDTH
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.recurrent_block.chain import RecurrentBlock
from griffin.kernels.recurrent_block.reference import Observer, recurrent_block_reference
from griffin.kernels.selection import resolve_backend

__all__ = ["Observer", "recurrent_block"]


def recurrent_block(
    xy: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    decay: Tensor,
    *,
    xy_bias: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str = AUTO,
    save_states: bool = True,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrent block from the product of its input linears (arXiv 2402.19427, sections 2.3 and 2.4).

        before, branch = xy + xy_bias
        x = causal_conv1d(before, conv_weight, conv_bias)
        input gate, recurrence gate = x times the blocks of gate_weight, plus gate_bias
        y = rglru(x, gates, decay) gelu(branch)

    One autograd function, whose backward writes the gradient of xy as one tensor, and adds the gates' part of the
    gradient of x in place. It keeps xy, x, both gates and, with `save_states`, the states.

    Args:
        xy: [T, B, 2 R], floating point.
        conv_weight, conv_bias: [K, R] and [R], as in `griffin.kernels.conv1d.causal_conv1d`.
        gate_weight: [N, w, 2 w] with R = N w, in the dtype of xy: of each block, input x (input | recurrence gate).
        gate_bias, decay: [2, R] and [R], as in `griffin.kernels.rglru.rglru`.
        xy_bias: [2 R], floating point, added to xy within the programs. None: xy includes it.
        starts: [T, B] bool, True at each document's first token; None: each sequence is one document.
        backend: "reference" (loops, differentiated by autograd), "cpu", "triton" (K 4 only), or "auto", which
            selects by `griffin.kernels.selection.select_backend`.
        save_states: keep the states of the recurrence for the backward; False recomputes them there.
        observe: called in the forward with the input and the recurrence gate before their sigmoid, biases included.

    Returns:
        y [T, B, R] in the dtype of xy, and the recurrence's last state, [B, R] in float32 (float64 where xy is).

    Raises:
        NotImplementedError: forward-mode differentiation with a backend other than "reference".
        ValueError: the shape, dtype or device of an argument does not match xy, or the backend is unknown or cannot
            run.
    """
    check_sequences("xy", xy)
    if xy.shape[2] % 2:
        raise ValueError(f"xy: shape {list(xy.shape)}; accepted: [T, B, 2 R]")
    width = xy.shape[2] // 2
    if conv_weight.ndim != 2 or len(conv_weight) == 0:
        raise ValueError(f"conv_weight: shape {list(conv_weight.shape)}; accepted: [K, R], K >= 1")
    if gate_weight.ndim != 3 or len(gate_weight) == 0 or width % len(gate_weight):
        raise ValueError(f"gate_weight: shape {list(gate_weight.shape)}; accepted: [N, w, 2 w], N w = {width}")
    block = width // len(gate_weight)
    for name, tensor, shape, dtypes in (
        ("xy_bias", xy_bias, xy.shape[2:], FLOATING),
        ("conv_weight", conv_weight, (len(conv_weight), width), FLOATING),
        ("conv_bias", conv_bias, (width,), FLOATING),
        ("gate_weight", gate_weight, (len(gate_weight), block, 2 * block), (xy.dtype,)),
        ("gate_bias", gate_bias, (2, width), FLOATING),
        ("decay", decay, (width,), FLOATING),
        ("starts", starts, xy.shape[:2], (torch.bool,)),
    ):
        check_argument(name, tensor, shape, dtypes, "xy", xy)
    backend = resolve_backend(backend, xy.device, xy.dtype)
    if backend == "triton" and len(conv_weight) != TRITON_WIDTH:
        raise ValueError(f"conv_weight: {len(conv_weight)} taps; backend 'triton' has {TRITON_WIDTH}")
    tensors = (xy, xy_bias, conv_weight, conv_bias, gate_weight, gate_bias, decay)
    if backend == "reference":
        return recurrent_block_reference(*tensors, starts, observe)
    return RecurrentBlock.apply(*without_tangents(*tensors), starts, save_states, backend, observe)

"""The recurrence and its convolution over many widths, lengths and batches. This module imports torch.

Tensors are [T, B, R]: positions, sequences, channels. All channels are independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from griffin.kernels.conv1d import TRITON_WIDTH, causal_conv1d
from griffin.kernels.rglru import rglru
from griffin.tools.bench.kernels.operations import Arguments, Inputs, Operation, Random, Tensors


@dataclass(frozen=True)
class Shape:
    width: int  # R
    steps: int  # T
    batch: int  # B

    @property
    def elements(self) -> int:
        return self.width * self.steps * self.batch

    def __str__(self) -> str:
        return f"R {self.width}, T {self.steps}, B {self.batch}"


def _make_rglru(shape: Shape, random: Random, names: tuple[str, ...]) -> Inputs:
    full = (shape.steps, shape.batch, shape.width)
    leaves = {name: random.normal(*full) for name in names} | {"decay": random.decay(shape.width)}
    return random.inputs(leaves, grads={"y": random.normal(*full)})


def _rglru(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    y, last_state = rglru(**inputs, backend=backend, chunk=chunk)
    return {"y": y, "last_state": last_state}


def _rglru_from_zero(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    """Run from a zero state, so that the first position is like any other, as in peers, which have no documents."""
    x = inputs["x"]
    zero = x.new_zeros(x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
    y, last_state = rglru(**inputs, initial_state=zero, backend=backend, chunk=chunk)
    return {"y": y, "last_state": last_state}


def _make_conv1d(shape: Shape, random: Random) -> Inputs:
    full = (shape.steps, shape.batch, shape.width)
    leaves = {
        "x": random.normal(*full),
        "weight": random.parameter(TRITON_WIDTH, shape.width),
        "bias": random.parameter(shape.width),
    }
    return random.inputs(leaves, grads={"y": random.normal(*full)})


def _conv1d(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    return {"y": causal_conv1d(**inputs, backend=backend)}


_make_from_gates = partial(_make_rglru, names=("x", "input_gate", "recurrence_gate"))
_make_with_branch = partial(_make_rglru, names=("x", "input_gate", "recurrence_gate", "branch"))

RGLRU = Operation("rglru", _make_from_gates, _rglru, in_chunks=True, mixes_channels=False)
RGLRU_BRANCH = Operation("rglru + branch", _make_with_branch, _rglru, in_chunks=True, mixes_channels=False)
CONV1D = Operation("causal_conv1d", _make_conv1d, _conv1d, mixes_channels=False)
OPERATIONS = (RGLRU, RGLRU_BRANCH, CONV1D)
RGLRU_FROM_ZERO = Operation("rglru", _make_from_gates, _rglru_from_zero, in_chunks=True, mixes_channels=False)

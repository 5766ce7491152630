"""Operations that `griffin bench kernels` measures: their inputs, the check of their results, and their timing.

Tensors are [T, B, R]: positions, sequences, channels. This module imports torch.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from griffin.kernels.conv1d import TRITON_WIDTH, causal_conv1d
from griffin.kernels.rglru import rglru
from griffin.kernels.rglru.reference import GATE_SCALE

Tensors = dict[str, Tensor]

# Largest difference from float64, relative to the largest value of each result. bfloat16: results, and states that the
# backward reads, are rounded to 8 bits, which gives about 3e-3. float32: channels remember some thousand positions,
# over which rounding errors of the decay add up.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
CHANNELS = 64  # channels compared: they do not mix, so some of them are enough to check a full-width result

SETS = 3  # sets of inputs that rounds use in turn
LARGE_SET = 2**30  # bytes: a set this large does not fit into any cache, so one is enough
FLUSH_BYTES = 2**29  # more than any cache holds
HEAD_START = 2.0  # ms for which the device is kept busy before the timed work
WARM_UP = 2  # untimed rounds
MARGIN = 1.1  # factor on memory, for states of chunks and fragmentation


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


@dataclass(frozen=True)
class Operation:
    """One of our operations. `run` takes the inputs, a backend and a chunk length (None: chosen), and returns y first.

    forward_tensors, backward_tensors: number of tensors [T, B, R] that each pass must read or write at least once.
    """

    name: str
    inputs: tuple[str, ...]  # names of inputs [T, B, R]
    parameters: Mapping[str, int]  # rows of parameters [rows, R]; 0 for [R]
    forward_tensors: int
    backward_tensors: int
    run: Callable[[Tensors, str, int | None], Tensors]
    in_chunks: bool = True  # whether it is a recurrence, which can be cut into chunks

    def floor_bytes(self, shape: Shape, element_size: int) -> int:
        """Return the least number of bytes that forward and backward move."""
        return (self.forward_tensors + self.backward_tensors) * shape.elements * element_size

    def memory(self, shape: Shape, element_size: int) -> int:
        """Return the bytes needed for all sets of inputs, one forward and backward, and the check in float64."""
        tensor = shape.elements * element_size
        at_work = self.backward_tensors + 1 + (self.sets(shape, element_size) - 1) * (len(self.inputs) + 1)
        compared = 24 * 8 * shape.elements // shape.width * min(CHANNELS, shape.width)
        return int(MARGIN * (at_work * tensor + compared))

    def sets(self, shape: Shape, element_size: int) -> int:
        """Return the number of sets of inputs."""
        return 1 if (len(self.inputs) + 1) * shape.elements * element_size >= LARGE_SET else SETS


def _rglru(inputs: Tensors, backend: str, chunk: int | None) -> Tensors:
    y, last_state = rglru(**inputs, backend=backend, chunk=chunk)  # type: ignore[arg-type]
    return {"y": y, "last_state": last_state}


def _rglru_from_zero(inputs: Tensors, backend: str, chunk: int | None) -> Tensors:
    """Run from a zero state, so that the first position is like any other, as in peers, which have no documents."""
    x = inputs["x"]
    zero = x.new_zeros(x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
    y, last_state = rglru(**inputs, initial_state=zero, backend=backend, chunk=chunk)  # type: ignore[arg-type]
    return {"y": y, "last_state": last_state}


def _conv1d(inputs: Tensors, backend: str, chunk: int | None) -> Tensors:
    return {"y": causal_conv1d(**inputs, backend=backend)}  # type: ignore[arg-type]


GATES = ("x", "input_gate", "recurrence_gate")
RGLRU = Operation("rglru", GATES, {"decay": 0}, 4, 8, _rglru)
# The forward writes y and h; the backward reads h.
RGLRU_BRANCH = Operation("rglru + branch", (*GATES, "branch"), {"decay": 0}, 6, 10, _rglru)
CONV1D = Operation("causal_conv1d", ("x",), {"weight": TRITON_WIDTH, "bias": 0}, 2, 3, _conv1d, in_chunks=False)
OPERATIONS = (RGLRU, RGLRU_BRANCH, CONV1D)
RGLRU_FROM_ZERO = Operation("rglru", GATES, {"decay": 0}, 4, 8, _rglru_from_zero)


@dataclass(frozen=True)
class Inputs:
    leaves: Tensors
    grad_y: Tensor


def make_inputs(operation: Operation, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Inputs]:
    """Make sets of random inputs. Decays give a between 0.9 and 0.999 for r = 1: long memories.

    A Griffin starts with shorter memories: there the eighth root of a is in that range.
    """
    generator = torch.Generator(device).manual_seed(0)
    full = (shape.steps, shape.batch, shape.width)
    element_size = torch.empty((), dtype=dtype).element_size()
    sets = []
    for _ in range(operation.sets(shape, element_size)):
        leaves = {name: torch.randn(full, generator=generator, dtype=dtype, device=device) for name in operation.inputs}
        for name, count in operation.parameters.items():
            size = (count, shape.width) if count else (shape.width,)
            if name == "decay":
                a = torch.empty(size, device=device).uniform_(0.9, 0.999, generator=generator)
                leaves[name] = torch.log(torch.expm1(-a.log() / GATE_SCALE))
            else:
                leaves[name] = torch.randn(size, generator=generator, device=device)
        grad_y = torch.randn(full, generator=generator, dtype=dtype, device=device)
        sets.append(Inputs({name: leaf.requires_grad_() for name, leaf in leaves.items()}, grad_y))
    return sets


@dataclass(frozen=True)
class Implementation:
    """An implementation to time: a forward of leaves, whose result y is differentiated, with its sets of inputs.

    `order` is the permutation of our axes in its three-dimensional tensors.
    """

    forward: Callable[[Tensors], Tensors]
    sets: list[Inputs]
    order: tuple[int, int, int] = (0, 1, 2)

    def results(self, inputs: Inputs) -> Tensors:
        """Return the forward's results and the gradients of all leaves."""
        outputs = self.forward(inputs.leaves)
        grads = torch.autograd.grad(outputs["y"], list(inputs.leaves.values()), inputs.grad_y)
        named = {f"gradient of {name}": grad for name, grad in zip(inputs.leaves, grads, strict=True)}
        return {name: tensor.detach() for name, tensor in outputs.items()} | named

    def ours(self, tensor: Tensor) -> Tensor:
        """Permute a tensor of this implementation to our order of axes."""
        return tensor if tensor.ndim != 3 else tensor.permute([self.order.index(axis) for axis in range(3)])


def our_implementation(operation: Operation, sets: list[Inputs], chunk: int | None) -> Implementation:
    return Implementation(lambda leaves: operation.run(leaves, "triton", chunk), sets)


def check(name: str, implementation: Implementation, operation: Operation, inputs: Inputs) -> None:
    """Compare results for an implementation's first set of inputs with float64 on the same device, on some channels.

    Args:
        name: of the implementation, for the error.
        implementation: what to check.
        operation: the operation that it implements; its backend "cpu" is the reference.
        inputs: the same set of inputs in our layout.

    Raises:
        RuntimeError: y, the last state if it is returned, or a gradient differs by more than TOLERANCE.
    """
    width = inputs.grad_y.shape[-1]
    some = torch.linspace(0, width - 1, min(CHANNELS, width)).round().long().to(inputs.grad_y.device)
    results = implementation.results(implementation.sets[0])
    found = {result: implementation.ours(tensor)[..., some] for result, tensor in results.items()}

    leaves = {name: leaf.detach()[..., some].double().requires_grad_() for name, leaf in inputs.leaves.items()}
    reference = Implementation(lambda leaves: operation.run(leaves, "cpu", None), [])
    expected = reference.results(Inputs(leaves, inputs.grad_y[..., some].double()))
    compare(name, found, expected, TOLERANCE[inputs.grad_y.dtype])


def compare(name: str, found: Tensors, expected: Tensors, tolerance: float) -> None:
    """Raise RuntimeError if a result differs from the expected one by more than `tolerance` of its largest value."""
    for result, value in found.items():
        size = expected[result].abs().max()
        difference = ((value.double() - expected[result]).abs().max() / size).item()
        if not difference <= tolerance:
            raise RuntimeError(
                f"{name}: {result} differs from the float64 result by {difference:.1e} of its size, more than "
                f"{tolerance:.0e}; it was not timed"
            )


class Clock:
    """Times work on a device in milliseconds: with events on a GPU, else with the wall clock.

    Before the work, a buffer larger than any cache is overwritten repeatedly. The inputs then come from memory, and the
    host has queued the work before the device starts it, so that launch overhead is not included.
    """

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffer = torch.zeros(flush_bytes, dtype=torch.uint8, device=device)
        self._fills = 1
        if self._on_gpu:
            self.time(self._buffer.zero_)
            self._fills = math.ceil(HEAD_START / self.time(self._buffer.zero_)[0])

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Run the work; returns its milliseconds and its result."""
        for _ in range(self._fills):
            self._buffer.zero_()
        if not self._on_gpu:
            begun = time.perf_counter()
            result = work()
            return 1000 * (time.perf_counter() - begun), result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), result


@dataclass(frozen=True)
class Times:
    """Medians in milliseconds."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def time_implementations(clock: Clock, implementations: Mapping[str, Implementation], repeats: int) -> dict[str, Times]:
    """Time forward and backward separately, implementations in turn, so that changes of speed affect all of them."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in implementations}
    for number in range(WARM_UP + repeats):
        for name, implementation in implementations.items():
            inputs = implementation.sets[number % len(implementation.sets)]
            forward, outputs = clock.time(partial(implementation.forward, inputs.leaves))
            leaves = list(inputs.leaves.values())
            backward = clock.time(partial(torch.autograd.grad, outputs.pop("y"), leaves, inputs.grad_y))[0]
            del outputs  # before the next forward
            rounds[name].append((forward, backward))
    return {
        name: Times(*(statistics.median(times) for times in zip(*values[WARM_UP:], strict=True)))
        for name, values in rounds.items()
    }


def copy_bandwidth(clock: Clock, device: torch.device, size: int, repeats: int) -> float:
    """Measure the bytes per second, read plus written, of copying a bfloat16 tensor of `size` bytes."""
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    times = [clock.time(lambda: target.copy_(source))[0] for _ in range(WARM_UP + repeats)]
    return 2 * size / (statistics.median(times[WARM_UP:]) / 1000)


def free_bytes(device: torch.device) -> int:
    """Return the memory available for new tensors, after freeing the allocator's unused memory."""
    gc.collect()
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]

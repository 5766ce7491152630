"""An operation that `griffin bench kernels` measures: its inputs, and the check of its results. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.rglru.reference import GATE_SCALE

Tensors = dict[str, Tensor]
Arguments = dict[str, Any]

# Largest difference from float64, relative to the largest value of each result. bfloat16: results, and states that the
# backward reads, are rounded to 8 bits, which gives about 3e-3. float32: channels remember some thousand positions,
# over which rounding errors of the decay add up.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
CHANNELS = 64  # channels compared where they do not mix: some of them are enough to check a full-width result


class DifferenceError(RuntimeError):
    """A result differs from the float64 result."""


@dataclass(frozen=True)
class Inputs:
    """A set of inputs, by name of the argument.

    leaves: that have gradients.
    grads: the gradient of each differentiable result, by its name; empty where there is no backward.
    fixed: the other arguments, tensors or not.
    sums: arguments to which a run adds, zero at first. They are compared like results.
    """

    leaves: Tensors
    grads: Tensors
    fixed: Arguments = field(default_factory=dict)
    sums: Tensors = field(default_factory=dict)

    @property
    def all(self) -> Arguments:
        """All arguments."""
        return {**self.leaves, **self.fixed, **self.sums}

    @property
    def bytes(self) -> int:
        values = (*self.all.values(), *self.grads.values())
        return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))

    def gradients(self, outputs: Tensors) -> Tensors:
        """Return the leaves' gradients, without those that are added to `sums` instead."""
        if not self.grads:
            return {}
        results = [outputs[name] for name in self.grads]
        found = torch.autograd.grad(results, list(self.leaves.values()), list(self.grads.values()), allow_unused=True)
        named = dict(zip(self.leaves, found, strict=True))
        assert self.sums or None not in found, f"no gradient: {[name for name, grad in named.items() if grad is None]}"
        return {name: grad for name, grad in named.items() if grad is not None}

    def wide(self, part: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Inputs:
        """Return a float64 copy, of a part of each tensor. What is added to is zero again."""

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = part(value.detach())
            return value.double() if value.is_floating_point() else value

        leaves = {name: copied(leaf).requires_grad_() for name, leaf in self.leaves.items()}
        grads, fixed = ({name: copied(value) for name, value in each.items()} for each in (self.grads, self.fixed))
        sums = {name: torch.zeros_like(copied(total)) for name, total in self.sums.items()}
        return Inputs(leaves, grads, fixed, sums)


class Random:
    """Random tensors of a dtype on a device, of which every new one gives the same."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        # Tensors on the meta device have no values, and it has no generators.
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def normal(self, *size: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        made = torch.randn(size, generator=self._generator, dtype=dtype or self.dtype, device=self.device)
        return made if scale == 1.0 else made.mul_(scale)

    def parameter(self, *size: int, scale: float = 1.0) -> Tensor:
        """One that the operations take in float32, whatever the dtype."""
        return self.normal(*size, dtype=torch.float32, scale=scale)

    def decay(self, width: int) -> Tensor:
        """Decays [R] that give a between 0.9 and 0.999 for r = 1: long memories.

        A Griffin starts with shorter memories: there the eighth root of a is in that range.
        """
        a = torch.empty(width, device=self.device).uniform_(0.9, 0.999, generator=self._generator)
        return torch.log(torch.expm1(-a.log() / GATE_SCALE))

    def integers(self, below: int, *size: int) -> Tensor:
        return torch.randint(below, size, generator=self._generator, device=self.device)

    def inputs(self, leaves: Tensors, **others: Any) -> Inputs:
        """Inputs of which the leaves require gradients. `others` are the other fields of `Inputs`."""
        return Inputs({name: leaf.requires_grad_() for name, leaf in leaves.items()}, **others)

    def sum(self, *size: int) -> Tensor:
        """Zeros in the dtype of sums."""
        dtype = accumulation_dtype(torch.empty(0, dtype=self.dtype))
        return torch.zeros(size, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Operation:
    """One of our operations.

    make: returns inputs of a shape.
    run: takes all inputs, a backend, and a chunk length (None: chosen), and returns the results.
    in_chunks: it is a recurrence, which can be cut into chunks of time.
    mixes_channels: results depend on other channels (the last axis of every tensor) of the inputs.
    refuses: returns why the operation cannot run for a shape in a dtype on a device.
    """

    name: str
    make: Callable[[Any, Random], Inputs]
    run: Callable[[Arguments, str, int | None], Tensors]
    in_chunks: bool = False
    mixes_channels: bool = True
    refuses: Callable[[Any, torch.dtype, torch.device], str | None] = lambda shape, dtype, device: None


@dataclass(frozen=True)
class Implementation:
    """An implementation to time: a forward of all inputs, whose results are differentiated, with its sets of inputs.

    `order` is the permutation of our axes in its three-dimensional tensors.
    """

    forward: Callable[[Arguments], Tensors]
    sets: list[Inputs]
    order: tuple[int, int, int] = (0, 1, 2)

    def results(self, inputs: Inputs) -> Tensors:
        """Return the forward's results, the gradients of all leaves, and sums."""
        outputs = self.forward(inputs.all)
        grads = {f"gradient of {name}": grad for name, grad in inputs.gradients(outputs).items()}
        sums = {f"sum {name}": total.clone() for name, total in inputs.sums.items()}
        return {name: tensor.detach() for name, tensor in outputs.items()} | grads | sums

    def ours(self, tensor: Tensor) -> Tensor:
        """Permute a tensor of this implementation to our order of axes."""
        return tensor if tensor.ndim != 3 else tensor.permute([self.order.index(axis) for axis in range(3)])


def make_sets(operation: Operation, shape: Any, dtype: torch.dtype, device: torch.device, count: int) -> list[Inputs]:
    """Make sets of inputs of different values."""
    random = Random(dtype, device)
    return [operation.make(shape, random) for _ in range(count)]


def our_implementation(operation: Operation, sets: list[Inputs], chunk: int | None) -> Implementation:
    return Implementation(lambda inputs: operation.run(inputs, "triton", chunk), sets)


def check(name: str, implementation: Implementation, operation: Operation, inputs: Inputs) -> None:
    """Compare results for an implementation's first set of inputs with float64 on the same device.

    Where channels do not mix, only some of them are compared.

    Args:
        name: of the implementation, for the error.
        implementation: what to check.
        operation: the operation that it implements; its backend "cpu" is the reference.
        inputs: the same set of inputs in our layout.

    Raises:
        DifferenceError: a result (peers may have fewer), a gradient or a sum differs by more than TOLERANCE.
    """

    def part(tensor: Tensor) -> Tensor:
        if operation.mixes_channels or not tensor.ndim:
            return tensor
        width = tensor.shape[-1]
        return tensor[..., torch.linspace(0, width - 1, min(CHANNELS, width)).round().long().to(tensor.device)]

    found = {
        result: part(implementation.ours(tensor))
        for result, tensor in implementation.results(implementation.sets[0]).items()
    }
    reference = Implementation(lambda all_inputs: operation.run(all_inputs, "cpu", None), [])
    expected = reference.results(inputs.wide(part))
    is_half = any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in inputs.all.values())
    compare(name, found, expected, TOLERANCE[torch.bfloat16 if is_half else torch.float32])


def compare(name: str, found: Tensors, expected: Tensors, tolerance: float) -> None:
    """Raise DifferenceError if a result differs from the expected one by more than `tolerance` of its largest value."""
    for result, value in found.items():
        size = expected[result].abs().max()
        difference = ((value.double() - expected[result]).abs().max() / size).item()
        if not difference <= tolerance:
            raise DifferenceError(
                f"{name}: {result} differs from the float64 result by {difference:.1e} of its size, more than "
                f"{tolerance:.0e}; it was not timed"
            )

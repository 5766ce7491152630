"""Attention for `griffin bench kernels`: each backend that can run, forward and backward. This module imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from griffin.kernels.backends import ATTENTION_BACKENDS
from griffin.kernels.local_attention import attention_mask, multi_query_attention, resolve_backend
from griffin.kernels.local_attention.reference import multi_query_attention_reference
from griffin.parallel.mixers.attention import mean_keys
from griffin.tools.bench.kernels_operations import (
    SETS,
    TOLERANCE,
    Clock,
    Implementation,
    Inputs,
    Tensors,
    Times,
    compare,
    time_implementations,
)

COLUMNS = f"{'attention':<16}{'':<22}{'forward':>12}{'backward':>12}{'TFLOP/s':>10}"


@dataclass(frozen=True)
class AttentionShape:
    batch: int
    heads: int
    length: int
    window: int | None
    head_dim: int

    @property
    def flops(self) -> float:
        """FLOPs of forward and backward, 2 and 5 products, over the scores that queries see in one document."""
        keys = mean_keys(self.length, self.window)
        return 2.0 * (2 + 5) * self.batch * self.heads * self.length * keys * self.head_dim

    def __str__(self) -> str:
        return f"B {self.batch}, H {self.heads}, T {self.length}, window {self.window}, hd {self.head_dim}"


# A rank of griffin-14b with tensor 4 and 2, griffin-1.3b, and RecurrentGemma-2B and 9B.
SHAPES = (
    AttentionShape(4, 10, 2048, 1024, 128),
    AttentionShape(4, 20, 2048, 1024, 128),
    AttentionShape(4, 16, 2048, 1024, 128),
    AttentionShape(4, 10, 2048, 2048, 256),
    AttentionShape(4, 4, 8192, 2048, 256),
    AttentionShape(1, 10, 8192, None, 128),
)


@dataclass(frozen=True)
class AttentionRow:
    backend: str
    shape: AttentionShape
    times: Times

    def __str__(self) -> str:
        rate = self.shape.flops / self.times.total / 1e9
        return f"{'':<16}{self.backend:<22}{self.times.forward:9.3f} ms{self.times.backward:9.3f} ms{rate:10,.0f}"


def measure_attention(
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    shapes: Sequence[AttentionShape] = SHAPES,
    clock: Clock | None = None,
) -> list[AttentionRow]:
    """Check and time every backend but, on a GPU, `sdpa`, and print a line for each, also if it cannot run.

    Raises RuntimeError if a result or gradient differs from float64; it is then not timed.
    """
    clock, rows = clock or Clock(device), []
    for shape in shapes:
        print(f"\n{shape}\n{COLUMNS}", flush=True)
        sets = [_inputs(shape, dtype, device, seed) for seed in range(SETS)]
        sides = {}
        for backend in ATTENTION_BACKENDS:
            if backend == "sdpa" and device.type == "cuda":
                continue
            try:
                resolve_backend(backend, device, dtype, shape.head_dim)
                side = _implementation(backend, shape, sets, device)
                _check(f"attention with {backend}, {shape}", side, shape)
                sides[backend] = side
            except (ValueError, torch.OutOfMemoryError) as error:
                print(f"{'':<16}{backend:<22}skipped: {str(error).splitlines()[0]}", flush=True)
        for backend, times in time_implementations(clock, sides, repeats).items():
            row = AttentionRow(backend, shape, times)
            print(row, flush=True)
            rows.append(row)
    return rows


def _inputs(shape: AttentionShape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(shape.length, shape.batch, *size, generator=generator, dtype=dtype, device=device)

    q, k, v = random(shape.heads, shape.head_dim), random(shape.head_dim), random(shape.head_dim)
    leaves = {name: tensor.requires_grad_() for name, tensor in (("q", q), ("k", k), ("v", v))}
    return Inputs(leaves, random(shape.heads * shape.head_dim))


def _documents(shape: AttentionShape, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape.batch, shape.length, dtype=torch.int64, device=device)


def _implementation(backend: str, shape: AttentionShape, sets: list[Inputs], device: torch.device) -> Implementation:
    """The mask is made once, as for all blocks of a micro-batch."""
    mask = attention_mask(_documents(shape, device), shape.window, backend=backend)

    def forward(leaves: Tensors) -> Tensors:
        return {"y": multi_query_attention(leaves["q"], leaves["k"], leaves["v"], mask)}

    return Implementation(forward, sets)


def _check(name: str, side: Implementation, shape: AttentionShape) -> None:
    """Compare the first sequence's result and gradients with float64, which holds all its scores."""
    inputs = side.sets[0]
    found = {result: tensor[:, :1] for result, tensor in side.results(inputs).items()}
    documents = _documents(shape, inputs.grad_y.device)[:1]

    def forward(leaves: Tensors) -> Tensors:
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        return {"y": multi_query_attention_reference(q, k, v, documents, shape.window)}

    leaves = {key: leaf.detach()[:, :1].double().requires_grad_() for key, leaf in inputs.leaves.items()}
    expected = Implementation(forward, []).results(Inputs(leaves, inputs.grad_y[:, :1].double()))
    compare(name, found, expected, TOLERANCE[inputs.grad_y.dtype])

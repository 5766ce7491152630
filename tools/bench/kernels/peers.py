"""Peers of the RG-LRU for `griffin bench kernels`: other projects' scans, with the gates in PyTorch.

Each peer gets x, both gates and the decay in the layout that it is made for. It computes decays and inputs of the
recurrence eagerly or with torch.compile, and differentiates all of it. This module imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.kernels.rglru.reference import GATE_SCALE
from griffin.tools.bench.kernels.operations import Arguments, Implementation, Inputs, Tensors, check
from griffin.tools.bench.kernels.recurrences import RGLRU_FROM_ZERO, Shape
from griffin.tools.bench.kernels.rows import Times
from griffin.tools.bench.kernels.timing import Clock, time_implementations

BATCH_TIME_CHANNELS = (1, 0, 2)  # permutations of our axes [T, B, R]
BATCH_CHANNELS_TIME = (1, 2, 0)
PACKAGES = {  # by name to install: the packages, any of which provides the peer
    "accelerated-scan": ("accelerated-scan",),
    "flash-linear-attention": ("flash-linear-attention", "fla-core"),
    "transformers": ("transformers",),
}
LOOP_REPEATS = 3  # of a loop in Python, which takes seconds

Forward = Callable[..., Tensor]  # y of x, input_gate, recurrence_gate, decay


@dataclass(frozen=True)
class Peer:
    name: str
    order: tuple[int, int, int]
    forward: Forward
    refuses: Callable[[Shape], str | None] = lambda shape: None  # returns why it cannot run a shape
    repeats: int | None = None  # most timed rounds of a slow peer

    def implementation(self, sets: list[Inputs]) -> Implementation:
        """Return the peer with the same inputs in its layout."""

        def forward(inputs: Arguments) -> Tensors:
            return {"y": self.forward(**inputs)}

        def to_layout(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            return tensor.permute(self.order).contiguous() if tensor.ndim == 3 else tensor.clone()

        moved = [
            Inputs(
                {name: to_layout(leaf).requires_grad_() for name, leaf in one.leaves.items()},
                {name: to_layout(grad) for name, grad in one.grads.items()},
            )
            for one in sets
        ]
        return Implementation(forward, moved, self.order)


def installed() -> dict[str, str | None]:
    """Return the versions of the peers' packages; None for those not installed."""
    found: dict[str, str | None] = {}
    for name, packages in PACKAGES.items():
        found[name] = None
        for package in packages:
            try:
                found[name] = found[name] or version(package)
            except PackageNotFoundError:
                continue
    return found


def log_decay_and_term(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return log a and sqrt(1 - a^2) i x in float32; `decay` broadcasts over x."""
    log_a = -GATE_SCALE * recurrence_gate.float().sigmoid() * F.softplus(decay)
    return log_a, torch.sqrt(-torch.expm1(2 * log_a)) * (input_gate.float().sigmoid() * x.float())


def decay_and_term(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and sqrt(1 - a^2) i x in float32: bfloat16 rounds decays near 1 to 1, which makes results useless."""
    log_a, term = log_decay_and_term(x, input_gate, recurrence_gate, decay)
    return log_a.exp(), term


def rounded_log_decay_and_term(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log a and sqrt(1 - a^2) i x in the dtype of x, which is precise enough for log a."""
    log_a, term = log_decay_and_term(x, input_gate, recurrence_gate, decay)
    return log_a.to(x.dtype), term.to(x.dtype)


def _both_ways(
    name: str, order: tuple[int, int, int], terms: Callable, scan: Callable, refuses: Callable
) -> list[Peer]:
    """Return a peer with eager gates and one with compiled gates. `scan` takes the terms and the dtype of y."""

    def forward(terms: Callable, x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor) -> Tensor:
        rate = decay[:, None] if order == BATCH_CHANNELS_TIME else decay
        return scan(*terms(x, input_gate, recurrence_gate, rate), x.dtype)

    return [
        Peer(f"{name}, {how} gates", order, partial(forward, function), refuses)
        for how, function in (("eager", terms), ("compiled", torch.compile(terms, dynamic=False)))
    ]


def _accelerated_scan(module: str) -> list[Peer]:
    scan = importlib.import_module(f"accelerated_scan.{module}").scan

    def forward(a: Tensor, term: Tensor, dtype: torch.dtype) -> Tensor:
        return scan(a.contiguous(), term.contiguous()).to(dtype)

    def refuses(shape: Shape) -> str | None:
        if module == "warp" and shape.steps not in [2**power for power in range(5, 17)]:
            return f"T {shape.steps} is not a power of two from 32 to 65536"
        if shape.elements > 2**31 - 1:
            return f"{shape.elements} elements are more than its 32-bit index can address"
        return None

    return _both_ways(f"accelerated-scan {module}", BATCH_CHANNELS_TIME, decay_and_term, forward, refuses)


def _flash_linear_attention(function: str) -> list[Peer]:
    scan = getattr(importlib.import_module("fla.ops.hgrn"), function)

    def forward(log_a: Tensor, term: Tensor, dtype: torch.dtype) -> Tensor:
        return scan(term, log_a)[0]

    return _both_ways(f"fla {function}", BATCH_TIME_CHANNELS, rounded_log_decay_and_term, forward, lambda shape: None)


def _transformers(steps: int) -> list[Peer]:
    """Return RecurrentGemma's loop over time, for shapes of `steps` steps only."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    def forward(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor) -> Tensor:
        a, term = decay_and_term(x, input_gate, recurrence_gate, decay)
        never = torch.zeros(*x.shape[:2], 1, dtype=torch.bool, device=x.device)
        # The method does not use `self`.
        return RecurrentGemmaRglru._rnn_scan(None, term.to(x.dtype), a, never, None)[0]

    def refuses(shape: Shape) -> str | None:
        return None if shape.steps == steps else f"a loop in Python, timed at T {steps} only"

    return [Peer("transformers' loop", BATCH_TIME_CHANNELS, forward, refuses, LOOP_REPEATS)]


def _associative_scan() -> list[Peer]:
    """Return PyTorch's own scan, compiled in one function with the gates."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (a_left, h_left), (a, h) = left, right
        return a * a_left, a * h_left + h

    def forward(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor) -> Tensor:
        terms = decay_and_term(x, input_gate, recurrence_gate, decay[:, None])
        return associative_scan(combine, terms, dim=2, combine_mode="pointwise")[1].to(x.dtype)

    return [Peer("torch associative_scan, compiled", BATCH_CHANNELS_TIME, torch.compile(forward, dynamic=False))]


def load_peers(steps: int) -> tuple[list[Peer], dict[str, str]]:
    """Return the peers that can be imported, and why others cannot. Python loops are timed at `steps` steps only."""
    loaders: dict[str, Callable[[], list[Peer]]] = {
        "accelerated-scan warp": partial(_accelerated_scan, "warp"),
        "accelerated-scan scalar": partial(_accelerated_scan, "scalar"),
        "fla fused_recurrent_hgrn": partial(_flash_linear_attention, "fused_recurrent_hgrn"),
        "fla chunk_hgrn": partial(_flash_linear_attention, "chunk_hgrn"),
        "torch associative_scan": _associative_scan,
        "transformers' loop": partial(_transformers, steps),
    }
    peers, reasons = [], {}
    for name, load in loaders.items():
        try:
            peers += load()
        except Exception as error:  # importing may compile code and fail in any way
            reasons[name] = describe(error)
    return peers, reasons


def time_peer(peer: Peer, shape: Shape, clock: Clock, ours: Implementation, repeats: int) -> tuple[Times, Times]:
    """Check a peer, then time ours and it in turn; returns our times and the peer's.

    Args:
        peer: the peer to time.
        shape: the shape of the inputs.
        clock: the clock of the device.
        ours: RGLRU_FROM_ZERO, already checked.
        repeats: number of timed rounds.

    Raises:
        Exception: anything that a peer raises, or RuntimeError if its results differ from ours.
    """
    theirs = peer.implementation(ours.sets)
    check(f"{peer.name}, {shape}", theirs, RGLRU_FROM_ZERO, ours.sets[0])
    times = time_implementations(clock, {"ours": ours, "theirs": theirs}, min(repeats, peer.repeats or repeats))
    return times["ours"], times["theirs"]


def describe(error: Exception) -> str:
    """Return the type of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

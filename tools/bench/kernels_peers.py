"""What `griffin bench kernels` compares the RG-LRU with: scans of others behind its gates in PyTorch.

Each peer gets x, both gates and the decay, in the layout that it is made for, computes decays and inputs of the
recurrence eagerly or by torch.compile, and differentiates all of it. Whoever imports this has imported torch.
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
from griffin.tools.bench.kernels_operations import (
    RGLRU_FROM_ZERO,
    Clock,
    Implementation,
    Inputs,
    Shape,
    Tensors,
    Times,
    check,
    time_implementations,
)

BATCH_TIME_CHANNELS = (1, 0, 2)  # places among our axes [T, B, R]
BATCH_CHANNELS_TIME = (1, 2, 0)
PACKAGES = {  # by the names to install them by, the packages that hold what is needed
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
    refuses: Callable[[Shape], str | None] = lambda shape: None  # why it cannot run a shape
    repeats: int | None = None  # where it is too slow for those asked for

    def implementation(self, sets: list[Inputs]) -> Implementation:
        """The same inputs in the peer's layout."""

        def forward(leaves: Tensors) -> Tensors:
            return {"y": self.forward(**leaves)}

        def there(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            return tensor.permute(self.order).contiguous() if tensor.ndim == 3 else tensor.clone()

        moved = [
            Inputs({name: there(leaf).requires_grad_() for name, leaf in one.leaves.items()}, there(one.grad_y))
            for one in sets
        ]
        return Implementation(forward, moved, self.order)


def installed() -> dict[str, str | None]:
    """Versions of the packages that peers come from; None for those that are not installed."""
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
    """log a and sqrt(1 - a^2) i x in float32; `decay` broadcasts over x."""
    log_a = -GATE_SCALE * recurrence_gate.float().sigmoid() * F.softplus(decay)
    return log_a, torch.sqrt(-torch.expm1(2 * log_a)) * (input_gate.float().sigmoid() * x.float())


def decay_and_term(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """a and sqrt(1 - a^2) i x in float32: in bfloat16 a decay near 1 is 1, and results are as large as their errors."""
    log_a, term = log_decay_and_term(x, input_gate, recurrence_gate, decay)
    return log_a.exp(), term


def rounded_log_decay_and_term(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """log a and sqrt(1 - a^2) i x in the dtype of x, which is exact enough for log a."""
    log_a, term = log_decay_and_term(x, input_gate, recurrence_gate, decay)
    return log_a.to(x.dtype), term.to(x.dtype)


def _both(name: str, order: tuple[int, int, int], terms: Callable, scan: Callable, refuses: Callable) -> list[Peer]:
    """A peer with its gates eager, and with them compiled. `scan` takes the terms and the dtype of y."""

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
            return f"T {shape.steps} is no power of two from 32 to 65536"
        if shape.elements > 2**31 - 1:
            return f"{shape.elements} elements, of which it cannot count more than 2^31 - 1"
        return None

    return _both(f"accelerated-scan {module}", BATCH_CHANNELS_TIME, decay_and_term, forward, refuses)


def _flash_linear_attention(function: str) -> list[Peer]:
    scan = getattr(importlib.import_module("fla.ops.hgrn"), function)

    def forward(log_a: Tensor, term: Tensor, dtype: torch.dtype) -> Tensor:
        return scan(term, log_a)[0]

    return _both(f"fla {function}", BATCH_TIME_CHANNELS, rounded_log_decay_and_term, forward, lambda shape: None)


def _transformers(steps: int) -> list[Peer]:
    """RecurrentGemma's loop over time, for shapes of so many steps only."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    def forward(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor) -> Tensor:
        a, term = decay_and_term(x, input_gate, recurrence_gate, decay)
        never = torch.zeros(*x.shape[:2], 1, dtype=torch.bool, device=x.device)
        # The method uses nothing of its object.
        return RecurrentGemmaRglru._rnn_scan(None, term.to(x.dtype), a, never, None)[0]

    def refuses(shape: Shape) -> str | None:
        return None if shape.steps == steps else f"a loop in Python, timed at T {steps} only"

    return [Peer("transformers' loop", BATCH_TIME_CHANNELS, forward, refuses, LOOP_REPEATS)]


def _associative_scan() -> list[Peer]:
    """PyTorch's own scan, gates and all in one compiled function."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (a_left, h_left), (a, h) = left, right
        return a * a_left, a * h_left + h

    def forward(x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor) -> Tensor:
        terms = decay_and_term(x, input_gate, recurrence_gate, decay[:, None])
        return associative_scan(combine, terms, dim=2, combine_mode="pointwise")[1].to(x.dtype)

    return [Peer("torch associative_scan, compiled", BATCH_CHANNELS_TIME, torch.compile(forward, dynamic=False))]


def load_peers(steps: int) -> tuple[list[Peer], dict[str, str]]:
    """Peers that can be imported, and why others cannot. A loop in Python is for shapes of so many steps only."""
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
        except Exception as error:  # importing may compile, and fail in any way
            reasons[name] = describe(error)
    return peers, reasons


def time_peer(peer: Peer, shape: Shape, clock: Clock, ours: Implementation, repeats: int) -> tuple[Times, Times]:
    """Check a peer, then time ourselves and it in turn: our times and the peer's.

    Args:
        ours: RGLRU_FROM_ZERO, checked.

    Raises:
        Exception: anything that a peer raises, or RuntimeError where its results are not ours.
    """
    theirs = peer.implementation(ours.sets)
    check(f"{peer.name}, {shape}", theirs, RGLRU_FROM_ZERO, ours.sets[0])
    times = time_implementations(clock, {"ours": ours, "theirs": theirs}, min(repeats, peer.repeats or repeats))
    return times["ours"], times["theirs"]


def describe(error: Exception) -> str:
    """The kind of an error and its first line, for a line of print."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

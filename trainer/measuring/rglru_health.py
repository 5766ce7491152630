"""Distributions of the RG-LRU's gates, decays and memory lengths over channels and tokens, per recurrent layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from griffin.kernels.recurrent_block import Observer
from griffin.kernels.rglru.reference import GATE_SCALE
from griffin.parallel.config import RECURRENT, ModelConfig
from griffin.parallel.mixers.recurrent import RecurrentMixer

# Memory lengths -1 / log a, in tokens, are counted in logarithmic bins of width 2^(1/16), so that a quantile is exact
# to within 4.4 %. Values outside of all bins are counted in the first or the last one.
FIRST_OCTAVE, LAST_OCTAVE, BINS_PER_OCTAVE = -8, 24, 16
BINS = (LAST_OCTAVE - FIRST_OCTAVE) * BINS_PER_OCTAVE
QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
SATURATED = 0.01  # a gate below this is closed; a gate above 1 minus this is open
GATES = ("input_gate", "recurrence_gate")
# Most values observed per layer, over all tensor ranks. Of longer micro-batches, evenly spaced tokens are observed.
VALUES = 2**21

_SUMS = ("decay", *(f"{gate}_{state}" for gate in GATES for state in ("closed", "open")))


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """Distributions of one recurrent layer, or of all together."""

    counts: Tensor  # of memory lengths by bin, float64 [BINS]
    sums: Tensor  # over the same values: of decays, and numbers of closed and open gates; float64 [len(_SUMS)]

    def values(self) -> dict[str, float]:
        """The figures by name; empty if nothing was observed."""
        total = self.counts.sum().item()
        if total == 0:
            return {}
        memory = {name: self.quantile(share) for name, share in QUANTILES.items()}
        means = dict(zip(_SUMS, (self.sums / total).tolist(), strict=True))
        return {
            "decay_mean": means.pop("decay"),
            **{f"decay_{name}": torch.tensor(-1 / length).exp().item() for name, length in memory.items()},
            **{f"memory_{name}": length for name, length in memory.items()},
            **means,
        }

    def quantile(self, share: float) -> float:
        """The memory length below which this share of values lies, interpolated logarithmically within its bin."""
        until = self.counts.cumsum(0)
        rank = share * until[-1].item()
        index = min(int(torch.searchsorted(until, rank)), BINS - 1)
        before = until[index].item() - self.counts[index].item()
        within = (rank - before) / max(self.counts[index].item(), 1.0)
        return float(2 ** (FIRST_OCTAVE + (index + within) / BINS_PER_OCTAVE))

    def histogram(self) -> tuple[list[float], list[float]]:
        """(upper ends, counts) of the bins of log2 of the memory length, in half octaves."""
        per = BINS_PER_OCTAVE // 2
        counts = self.counts.view(-1, per).sum(1)
        return [FIRST_OCTAVE + (index + 1) / 2 for index in range(len(counts))], counts.tolist()


@dataclass(frozen=True, kw_only=True)
class Health:
    """Distributions of all recurrent layers, by block index, over all ranks."""

    layers: dict[int, LayerHealth] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Tensor, model: ModelConfig) -> Health:
        """From what `Observation.summed` returns, on the CPU."""
        counts, sums = rows.split((BINS, len(_SUMS)), dim=1)
        return cls(
            layers={
                index: LayerHealth(counts=counts[row], sums=sums[row])
                for row, index in enumerate(_recurrent_layers(model))
            }
        )

    def values(self) -> dict[str, float]:
        """Figures such as "rglru/decay_p50/layer-00", and "rglru/decay_p50/all" over all layers."""
        layers = list(self.layers.values())
        everything = LayerHealth(
            counts=torch.stack([layer.counts for layer in layers]).sum(0),
            sums=torch.stack([layer.sums for layer in layers]).sum(0),
        )
        named = {"all": everything, **{layer_name(index): layer for index, layer in self.layers.items()}}
        return {f"rglru/{key}/{name}": value for name, layer in named.items() for key, value in layer.values().items()}


def layer_name(index: int) -> str:
    return f"layer-{index:02}"


class Observation:
    """Observes the gates of this rank's recurrent layers in the first micro-batch of a step."""

    def __init__(self) -> None:
        self._seen: dict[int, Tensor] = {}  # by block index, [BINS + len(_SUMS)]

    @contextmanager
    def of(self, stages: Iterable[nn.Module]) -> Iterator[None]:
        """Observe the gates of `stages` within this context. No computed value changes."""
        mixers = [mixer for stage in stages for mixer in stage.modules() if isinstance(mixer, RecurrentMixer)]
        for mixer in mixers:
            mixer.observe = self._observer(mixer)
        try:
            yield
        finally:
            for mixer in mixers:
                mixer.observe = None

    def summed(self, model: ModelConfig, device: torch.device) -> Tensor:
        """The sum over all ranks: they hold other channels, other layers or other data. A collective.

        Returns float64 [recurrent layers, BINS + len(_SUMS)] on the device, without waiting for it.
        """
        layers = _recurrent_layers(model)
        rows = torch.zeros(len(layers), BINS + len(_SUMS), dtype=torch.float64, device=device)
        for index, row in self._seen.items():
            rows[layers.index(index)] = row
        if layers:
            dist.all_reduce(rows)
        return rows

    def _observer(self, mixer: RecurrentMixer) -> Observer:
        piece = mixer.gates.weight.pieces[0]  # type: ignore[attr-defined]
        index, (blocks, width, _) = _block_index(piece.name), piece.shape

        def observe(input_gate: Tensor, recurrence_gate: Tensor) -> None:
            if index not in self._seen:  # later micro-batches and recomputation call this too
                tokens = input_gate.shape[0] * input_gate.shape[1]
                every = max(1, tokens * blocks * width // VALUES)
                self._seen[index] = distribution(input_gate, recurrence_gate, mixer.decay, every=every)

        return observe


@torch.no_grad()
def distribution(input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor, *, every: int = 1) -> Tensor:
    """Counts of memory lengths by bin, and the sums of `LayerHealth`: float64 [BINS + len(_SUMS)].

    Gates are [T, B, R], before their sigmoid; `decay` [R] is the parameter p. Every `every`-th token is observed.
    At a document's first token the recurrence is reset whatever its gate; its gate counts all the same. NaN is counted
    in the first bin: the loss of that step shows it.
    """
    gates = [gate[::every].float().sigmoid() for gate in (input_gate, recurrence_gate)]
    log_a = -GATE_SCALE * gates[1] * F.softplus(decay.float())
    octaves = (-1 / log_a.clamp(max=-torch.finfo(torch.float32).tiny)).log2()
    bins = ((octaves - FIRST_OCTAVE) * BINS_PER_OCTAVE).nan_to_num(nan=0.0).clamp(0, BINS - 1).long()
    sums = [log_a.exp().sum(dtype=torch.float64)]
    for gate in gates:
        sums += [(gate < SATURATED).sum().double(), (gate > 1 - SATURATED).sum().double()]
    # Not bincount, which waits for the device. Counts in float32 are exact to 2^24.
    counts = torch.histc(bins.float(), BINS, min=0, max=BINS).double()
    return torch.cat((counts, torch.stack(sums)))


def _recurrent_layers(model: ModelConfig) -> list[int]:
    return [index for index, mixer in enumerate(model.pattern) if mixer == RECURRENT]


def _block_index(name: str) -> int:
    """Index of a parameter's block in the whole model, from its canonical name."""
    match = re.match(r"blocks\.(\d+)\.", name)
    assert match is not None, name
    return int(match[1])

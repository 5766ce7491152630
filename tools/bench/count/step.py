"""The time of a training step by roofline: one micro-batch of the slowest pipeline rank, and what surrounds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from griffin.parallel.cost import train_flops_per_token
from griffin.parallel.world.axes import Axes
from griffin.tools.bench.count.rank import RankCount, count_rank
from griffin.tools.bench.count.rates import BESIDE, EXPOSED, Device, seconds
from griffin.tools.bench.count.recorder import Op
from griffin.trainer.settings.sections import Config

# Bytes per element and step of the optimizer: the whole float32 gradient is zeroed; of its shard, division by the
# number of tokens 8, norm 4, clipping 8, AdamW 28, weights to bfloat16 6.
WHOLE_BYTES, SHARD_BYTES = 4, 8 + 4 + 8 + 28 + 6
OPTIMIZER_KERNELS = 400
HIDDEN = 0.8  # part of a pass beside which data-parallel communication can run


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Seconds of one micro-batch on one rank."""

    rank: RankCount
    times: tuple[float, ...]  # of every operator; of a collective, what nothing hides

    @property
    def total(self) -> float:
        return sum(self.times)

    def by(self, *fields: str, communication: bool | None = None) -> Counter[tuple[str, ...]]:
        """Sums by these fields of operators; `communication` leaves out, or keeps alone, collectives."""
        sums: Counter[tuple[str, ...]] = Counter()
        for op, time in zip(self.rank.ops, self.times, strict=True):
            if communication is None or communication == (op.collective is not None):
                sums[tuple(getattr(op, field) for field in fields)] += time  # type: ignore[assignment]
        return sums


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step. `micro_batch` is that of the slowest pipeline rank, the first of `micro_batches`."""

    micro_batches: int
    ranks: tuple[MicroBatch, ...]  # by pipeline rank
    bubble: float
    sends: float  # activations between pipeline ranks, as far as they are not hidden
    optimizer: float
    data_parallel: float  # what is not hidden
    tokens: float  # per device
    model_flops: float  # per token, without recomputation
    data_size: int
    device: Device

    @property
    def slowest(self) -> MicroBatch:
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def total(self) -> float:
        return self.micro_batches * self.slowest.total + self.bubble + self.sends + self.optimizer + self.data_parallel

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        return self.model_flops * self.tokens_per_second / self.device.peak

    @property
    def static_bytes(self) -> float:
        """Weights, float32 gradients, and the shard of master weights and moments, of the rank that holds most."""
        return max(rank.rank.parameters for rank in self.ranks) * (6 + 12 / self.data_size)


def count_step(config: Config, world: int, device: Device) -> Step:
    """A step of `config`, which is valid for `world` ranks."""
    layout, train = config.parallel, config.train
    axes = Axes.of_layout(layout, world)
    data_size = world // layout.model_ranks
    ranks = tuple(
        micro_batch(count_rank(config, world, axes.ranks(pipeline=place)[0]), device)
        for place in range(layout.pipeline)
    )
    slowest = max(ranks, key=lambda rank: rank.total)
    sends = 0.0
    if layout.pipeline > 1:
        width = config.model.width / (layout.tensor if layout.sequence_parallel else 1)
        sends = 2 * train.micro_batch * config.data.sequence_length * width * 2 / device.network / 2
    return Step(
        micro_batches=train.global_batch // (train.micro_batch * data_size),
        ranks=ranks,
        bubble=(layout.pipeline - 1) / layout.virtual_pipeline * slowest.total,
        sends=sends,
        optimizer=_optimizer(max(rank.rank.parameters for rank in ranks), data_size, device),
        data_parallel=_data_parallel(slowest, data_size, layout.tensor, world, device),
        tokens=train.global_batch * config.data.sequence_length / world,
        model_flops=train_flops_per_token(config.model, config.data.sequence_length),
        data_size=data_size,
        device=device,
    )


def micro_batch(rank: RankCount, device: Device) -> MicroBatch:
    """Times of a rank's operators. An asynchronous collective runs beside the next product, which it slows.

    Of a collective in pieces beside its own products, the first or last piece and what slows the products remain.
    """
    times = []
    for place, op in enumerate(rank.ops):
        time = seconds(op, device)
        if op.collective is not None and op.collective.is_asynchronous:
            beside = _next_product(rank.ops[place + 1 :], device)
            time = max(0.0, time - beside) + BESIDE * min(time, beside)
        elif op.collective is not None and op.collective.is_pipelined:
            time = max(time - _next_product(rank.ops[place + 1 :], device), EXPOSED * time)
        times.append(time)
    return MicroBatch(rank=rank, times=tuple(times))


def _next_product(ops: Sequence[Op], device: Device) -> float:
    return next((seconds(op, device) for op in ops if op.product is not None), 0.0)


def _optimizer(parameters: int, data_size: int, device: Device) -> float:
    whole = parameters * WHOLE_BYTES / (0.9 * device.bandwidth)
    return whole + parameters / data_size * SHARD_BYTES / (0.85 * device.bandwidth) + OPTIMIZER_KERNELS * device.kernel


def _data_parallel(slowest: MicroBatch, data_size: int, tensor: int, world: int, device: Device) -> float:
    """Gradients are reduced beside the last backward pass, weights gathered beside the first forward pass.

    Ranks of a data-parallel group that share a node use their links to the network side by side.
    """
    if data_size == 1:
        return 0.0
    passes = slowest.by("phase", communication=False)
    moved = slowest.rank.parameters * (data_size - 1) / data_size
    sharing = max(1, min(device.node // tensor, data_size))
    link = device.node_link if world <= device.node else device.network * sharing
    exposed = slowest.rank.largest_parameter * 4 / link  # the table's gradient is complete at the end
    for time, beside in ((4 * moved / link, passes["backward",]), (2 * moved / link, passes["forward",])):
        exposed += max(0.0, time - HIDDEN * beside) + BESIDE * min(time, beside)
    return exposed

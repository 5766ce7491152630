"""Tables of a predicted step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from griffin.tools.bench.count.step import MicroBatch, Step

_LAYOUT = "{:26} {:>8} {:>6} {:>8} {:>7} {:>8} {:>8}"


def lines(step: Step, detail: int) -> Iterator[str]:
    slowest = step.slowest
    exposed = sum(slowest.by("module", communication=True).values())
    yield (
        f"step {step.total * 1e3:,.0f} ms = {step.micro_batches} micro-batches of {slowest.total * 1e3:.1f} (of which "
        f"exposed tensor-parallel communication {exposed * 1e3:.1f}) + pipeline bubble {step.bubble * 1e3:.0f} + sends "
        f"{step.sends * 1e3:.0f} + optimizer {step.optimizer * 1e3:.0f} + exposed data-parallel communication "
        f"{step.data_parallel * 1e3:.0f}"
    )
    if len(step.ranks) > 1:
        for place, rank in enumerate(step.ranks):
            yield f"pipeline rank {place}: blocks {list(rank.rank.blocks)}, micro-batch {rank.total * 1e3:.1f} ms"
    yield from _classes(slowest, exposed)
    yield from _modules(slowest)
    yield from _memory(step)
    if detail:
        yield from _largest(slowest, detail)


def _classes(micro_batch: MicroBatch, exposed: float) -> Iterator[str]:
    """Yield the table by class of kernels."""
    flops: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for op in micro_batch.rank.ops:
        if op.collective is None:
            flops[op.kind] += op.flops  # type: ignore[assignment]
            moved[op.kind] += op.bytes  # type: ignore[assignment]
            kernels[op.kind] += op.kernels
    yield ""
    yield _LAYOUT.format("class of kernels", "ms", "%", "TFLOP", "TFLOP/s", "GB", "kernels")
    for (kind,), time in micro_batch.by("kind", communication=False).most_common():
        yield _LAYOUT.format(
            kind,
            f"{time * 1e3:.2f}",
            f"{time / micro_batch.total:.1%}"[:-1],
            f"{flops[kind] / 1e12:.2f}",
            f"{flops[kind] / time / 1e12:.0f}",
            f"{moved[kind] / 1e9:.2f}",
            kernels[kind],
        )
    collectives = sum(op.collective is not None for op in micro_batch.rank.ops)
    share = f"{exposed / micro_batch.total:.1%}"[:-1]
    yield _LAYOUT.format("exposed communication", f"{exposed * 1e3:.2f}", share, "", "", "", collectives)


def _modules(micro_batch: MicroBatch) -> Iterator[str]:
    """Yield the table by kind of module."""
    phases = micro_batch.by("module", "phase", communication=False)
    products = micro_batch.by("module", "kind", communication=False)
    exposed = micro_batch.by("module", communication=True)
    yield ""
    yield _LAYOUT.format("module", "ms", "%", "forward", "backw.", "products", "exposed")
    for (module,), time in micro_batch.by("module").most_common():
        yield _LAYOUT.format(
            module,
            f"{time * 1e3:.2f}",
            f"{time / micro_batch.total:.1%}"[:-1],
            f"{phases[module, 'forward'] * 1e3:.2f}",
            f"{phases[module, 'backward'] * 1e3:.2f}",
            f"{products[module, 'products'] * 1e3:.2f}",
            f"{exposed[module,] * 1e3:.2f}",
        )


def _memory(step: Step) -> Iterator[str]:
    rank = max((rank.rank for rank in step.ranks), key=lambda rank: rank.peak + 6 * rank.parameters)
    yield ""
    yield f"memory per device, GB of {step.device.memory / 1e9:.0f}"
    yield f"  weights, float32 gradients and the optimizer's shard  {step.static_bytes / 1e9:8.2f}"
    yield f"  activations at the peak of a micro-batch              {rank.peak / 1e9:8.2f}"
    kept = ", ".join(f"{module} {size / 1e9:.2f}" for module, size in Counter(rank.kept).most_common())
    yield f"  saved for the backward pass of a micro-batch          {sum(rank.kept.values()) / 1e9:8.2f}: {kept}"
    for size, maker in rank.at_peak[:5]:
        yield f"  largest at the peak                                   {size / 1e9:8.2f}: {maker}"


def _largest(micro_batch: MicroBatch, count: int) -> Iterator[str]:
    """The operators that take the most time, equal ones together."""
    calls: Counter[tuple[str, ...]] = Counter()
    fields = ("module", "phase", "kind", "name", "shapes")
    for op in micro_batch.rank.ops:
        calls[tuple(getattr(op, field) for field in fields)] += 1
    yield ""
    yield f"{'calls':>6} {'ms':>8} {'us each':>8}"
    for key, time in micro_batch.by(*fields).most_common(count):
        yield f"{calls[key]:6} {time * 1e3:8.2f} {time / calls[key] * 1e6:8.1f}  {' | '.join(key)}"

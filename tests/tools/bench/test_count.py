"""`griffin bench count`: what is recorded of a step is what the model is known to compute, keep and exchange."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from griffin.kernels import conv1d, linear_scan, local_attention  # noqa: F401
from griffin.kernels.costs import COSTS, Product
from griffin.kernels.local_attention import counted
from griffin.kernels.rglru import rglru
from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.cost import block_cost, embedding_cost, logits_cost, train_flops_per_token
from griffin.parallel.mixers import MIXERS
from griffin.tools.bench.count.rank import RankCount, count_rank
from griffin.tools.bench.count.rates import DEVICES, product_efficiency, seconds
from griffin.tools.bench.count.recorder import Collective, Op
from griffin.tools.bench.count.step import count_step
from griffin.tools.cli import main
from griffin.trainer.settings.sections import Config, DataConfig, TrainConfig

MODEL = ModelConfig(
    pattern=(RECURRENT, ATTENTION),
    width=512,
    recurrent_width=512,
    heads=4,
    head_dim=128,
    window=128,
    gate_blocks=4,
    vocabulary=1024,
)
SEQUENCE, BATCH = 1024, 2


def config(*, tensor: int = 1, pipeline: int = 1, sequence_parallel: bool = False, recompute: str = "none") -> Config:
    return Config(
        model=MODEL,
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, sequence_parallel=sequence_parallel),
        data=DataConfig(train=("data",), sequence_length=SEQUENCE),
        train=TrainConfig(micro_batch=BATCH, global_batch=8, dtype="bfloat16", recompute=recompute),
    )


@pytest.fixture(scope="module")
def single() -> RankCount:
    return count_rank(config(), 1, 0)


def products(count: RankCount) -> float:
    return sum(op.flops for op in count.ops if op.product is not None)


def test_products_are_those_of_the_model(single: RankCount) -> None:
    """Products and attention are the model's FLOPs, but for scores that attention computes and masks."""
    visited = sum(op.flops for op in single.ops if op.kind == "attention")
    again = sum(op.flops for op in single.ops if op.kind == "attention backward")
    assert again == 3.5 * visited
    attended = 2 * 2 * BATCH * MODEL.heads * MODEL.head_dim * SEQUENCE * MODEL.window
    assert attended <= visited <= 2.0 * attended  # blocks of 128 keys at both ends of the window
    model = train_flops_per_token(MODEL, SEQUENCE) * BATCH * SEQUENCE
    without_attention = train_flops_per_token(dataclasses.replace(MODEL, window=1), SEQUENCE) * BATCH * SEQUENCE
    assert products(single) == pytest.approx(without_attention, rel=0.01)
    assert products(single) < model


def test_bytes_of_the_cost_model_are_those_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of products, by kind of module. What does not grow with the tokens is left out, or a few per cent."""
    tokens = BATCH * SEQUENCE
    recorded: dict[str, float] = defaultdict(float)
    # How many copies of keys and values balance the backward depends on the device, and is not in the cost model.
    monkeypatch.setattr(counted, "key_value_groups", lambda *_: 1)
    for op in count_rank(config(), 1, 0).ops:
        # Weights are concatenated, and the table's gradient is added once a micro-batch.
        if op.product is None and op.name != "cat" and (op.module != "logits" or op.kind == "loss"):
            recorded[op.module] += op.bytes / tokens
    mixers = {mixer: MIXERS[mixer].load().cost(MODEL, SEQUENCE).bytes for mixer in MODEL.pattern}
    both = sum(block_cost(MODEL, mixer, SEQUENCE).bytes - mixers[mixer] for mixer in MODEL.pattern)
    stated = {
        "recurrent mixer": mixers[RECURRENT],
        "attention mixer": mixers[ATTENTION],
        "MLP, norms": both,
        "embedding": embedding_cost(MODEL).bytes,
        "logits": logits_cost(MODEL).bytes,
    }
    recorded["MLP, norms"] = recorded["MLP"] + recorded["norms"]
    for module, per_token in stated.items():
        assert recorded[module] == pytest.approx(3 * per_token, rel=0.1), module


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "recompute"),
    [(2, False, "none"), (2, True, "none"), (2, True, "gather"), (4, True, "none")],
)
def test_tensor_ranks_share_products(single: RankCount, tensor: int, sequence_parallel: bool, recompute: str) -> None:
    """All but the key/value projections and the bias sums; and each block exchanges what its docstring says."""
    count = count_rank(config(tensor=tensor, sequence_parallel=sequence_parallel, recompute=recompute), tensor, 0)
    assert products(single) / tensor <= products(count) <= 1.1 * products(single) / tensor
    kinds = Counter(op.collective.kind for op in count.ops if op.collective and op.module == "MLP")
    blocks = MODEL.blocks
    if sequence_parallel:
        again = blocks if recompute == "gather" else 0
        assert kinds == {"all-gather": 2 * blocks + again, "reduce-scatter": 2 * blocks}
        kept = count_rank(config(tensor=tensor, sequence_parallel=True), tensor, 0).kept
        shard = BATCH * SEQUENCE * MODEL.width * 2 // tensor
        assert sum(kept.values()) - sum(count.kept.values()) == (2 * again * (tensor - 1) * shard)
    else:
        assert kinds == {"all-reduce": 2 * blocks}
    assert {op.collective.size for op in count.ops if op.collective} == {tensor}


def test_nothing_is_exchanged_inside_a_mixer_s_recurrence(single: RankCount) -> None:
    assert not any(op.collective for op in single.ops)


def test_pipeline_ranks_hold_the_model_together(single: RankCount) -> None:
    ranks = [count_rank(config(pipeline=2), 2, rank) for rank in range(2)]
    assert sum(products(rank) for rank in ranks) == products(single)
    assert sum(rank.parameters - rank.largest_parameter for rank in ranks) == (
        single.parameters - single.largest_parameter
    )
    assert [rank.blocks for rank in ranks] == [(1,), (1,)]


def test_recomputation_keeps_less_and_computes_more(single: RankCount) -> None:
    block = count_rank(config(recompute="block"), 1, 0)
    assert sum(block.kept.values()) < 0.6 * sum(single.kept.values())
    assert products(block) > 1.2 * products(single)


def test_norms_and_gelu_are_recomputed_without_a_product(single: RankCount) -> None:
    selective = count_rank(config(recompute="norms+gelu"), 1, 0)
    assert products(selective) == products(single)
    inputs = 2 * BATCH * SEQUENCE * (2 * MODEL.width + MODEL.mlp_width)  # bytes, of the mixer and both of the MLP
    assert sum(single.kept.values()) - sum(selective.kept.values()) == MODEL.blocks * inputs
    assert single.peak - selective.peak >= (MODEL.blocks - 1) * inputs  # a block at a time has them back
    again = {"griffin::rms_norm": 2 * MODEL.blocks, "griffin::gated_gelu": MODEL.blocks}
    names, plain = (Counter(op.name for op in count.ops) for count in (selective, single))
    assert {name: names[name] - plain[name] for name in again} == again


def test_memory_is_that_of_storages(single: RankCount) -> None:
    """At least what is kept is alive at the peak; the logits are the largest storage of so small a model."""
    assert single.peak >= sum(single.kept.values())
    assert single.at_peak[0][0] >= 2 * BATCH * SEQUENCE * MODEL.vocabulary


def test_every_operator_states_its_cost() -> None:
    """Those of the namespace that this process has registered."""

    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("griffin::")}
    assert {name.removesuffix(".default") for name in names} <= COSTS.keys()


def test_products_inside_operators_are_known_to_pytorch_s_counter() -> None:
    q = torch.empty(2, 4, 256, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k = torch.empty(2, 1, 256, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.ops.griffin.counted_attention(q, k, k, -1)[0].sum().backward()
    blocks = 3  # of 128 x 128 scores: two on the diagonal, and one below it
    assert counter.get_total_flops() == (2 + 7) * 2 * 2 * 4 * 64 * blocks * 128**2


def test_stated_bytes_are_at_least_inputs_and_outputs_and_below_plain_operators() -> None:
    """A fused operator reads and writes what it must, and less than its definition in PyTorch's own operators."""
    shape = (1024, 2, 512)
    x, input_gate, gate, branch = (
        torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(4)
    )
    decay = torch.empty(512, device="meta", requires_grad=True)
    from griffin.tools.bench.count.recorder import Recorder

    with Recorder() as recorder:
        y, _ = rglru(x, input_gate, gate, decay, branch=branch, backend="triton")
        y.backward(torch.empty_like(y))
    scans = [op for op in recorder.ops if op.kind == "scan"]
    tensor = 2 * 1024 * 2 * 512
    forward, backward = (op.bytes for op in scans)
    assert 6 * tensor <= forward <= 6 * tensor + 3 * tensor + 1e5  # x, gates and branch; y and states; a second reading
    assert 10 * tensor <= backward <= 10 * tensor + 3 * tensor + 1e5
    with Recorder() as plain:
        r, i = torch.sigmoid(gate), torch.sigmoid(input_gate)
        a = torch.exp(-8 * r * torch.nn.functional.softplus(decay))
        b = torch.sqrt(1 - a * a) * (i * x)
        h, _ = torch.ops.griffin.linear_scan(a, b.to(a.dtype), None, None, None, "triton")
        (h * torch.nn.functional.gelu(branch)).sum().backward()
    assert sum(op.bytes for op in scans) < 0.5 * sum(op.bytes for op in plain.ops)


def test_time_is_the_larger_of_moving_and_computing() -> None:
    device = DEVICES["h100"]
    large = Product(batch=1, m=8192, n=8192, k=8192)
    assert 0.8 < product_efficiency(large, device.multiprocessors) <= 1.0
    assert product_efficiency(Product(batch=1, m=128, n=128, k=8192), device.multiprocessors) < 0.05
    op = Op(name="mm", kind="products", module="", phase="", shapes="", bytes=1.0, flops=2.0 * 8192**3, product=large)
    assert seconds(op, device) > 2.0 * 8192**3 / device.products
    copy = dataclasses.replace(op, kind="elementwise", product=None, flops=0.0, bytes=3e12)
    assert seconds(copy, device) == pytest.approx(1 / 0.95, rel=1e-3)
    gather = Collective(kind="all-gather", bytes=300_000_000, size=4, is_asynchronous=False)
    exchange = dataclasses.replace(op, kind="communication", product=None, collective=gather)
    assert seconds(exchange, device) == pytest.approx(0.75e-3, rel=0.05)
    reduce = dataclasses.replace(exchange, collective=dataclasses.replace(gather, kind="all-reduce"))
    assert seconds(reduce, device) == pytest.approx(1.5e-3, rel=0.05)


def test_a_step_is_its_micro_batches_and_what_surrounds_them() -> None:
    step = count_step(config(pipeline=2), 4, DEVICES["h200"])
    assert step.micro_batches == 8 // (BATCH * 2)
    assert step.bubble == pytest.approx(step.slowest.total)
    assert step.total > step.micro_batches * step.slowest.total + step.bubble
    assert 0 < step.mfu < 1


def test_command_ends_with_the_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "count", "griffin-100m", "--world", "8", "--global-batch", "32", "--detail", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "Counted, not measured" in printed[0]
    words = printed[-1].split()
    assert words[0] == "MFU"
    assert 0 < float(words[1]) < 100
    assert words[2:] == ["%,", words[3], "tokens/s/device"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("griffin-100m", "--gemm", "0"), "--gemm 0"),
        (("griffin-100m", "--world", "3", "--tensor", "2"), "3"),
        (("griffin-100m", "--detail", "-1"), "--detail -1"),
        (("griffin-100m", "--train.steps", "3"), "--train.steps"),
        (("no-such-config", "--world", "8"), "no-such-config"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "count", *words]) == 2
    assert named in capsys.readouterr().err

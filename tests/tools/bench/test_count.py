"""`griffin bench count`: what is recorded of a step is what the model is known to compute, keep and exchange."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from griffin.kernels import conv1d, linear_scan, local_attention  # noqa: F401
from griffin.kernels.costs import COSTS, Product
from griffin.kernels.local_attention import counted
from griffin.kernels.rglru import rglru
from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.cost import block_cost, embedding_cost, logits_cost, train_flops_per_token
from griffin.parallel.mixers import MIXERS
from griffin.tools.bench.count import measured
from griffin.tools.bench.count.measured import Measured, check_memory, comparison, measure_step, operator_seconds
from griffin.tools.bench.count.rank import RankCount, count_rank
from griffin.tools.bench.count.rates import DEVICES, product_efficiency, seconds
from griffin.tools.bench.count.recorder import Collective, Op
from griffin.tools.bench.count.step import count_step
from griffin.tools.cli import main
from griffin.trainer.settings.sections import Config, DataConfig, TrainConfig

ROOT = Path(__file__).parents[3]
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
        (("griffin-100m", "--repeats", "0"), "--repeats 0"),
        (("griffin-100m", "--measure", "--world", "8"), "--world 8: must be 1 with --measure"),
        (("griffin-100m", "--measure", "--tensor", "2"), "tensor"),
        (("griffin-100m", "--measure"), "--measure: needs a CUDA device"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "count", *words]) == 2
    assert named in capsys.readouterr().err


SMALL = dataclasses.replace(
    MODEL, width=32, recurrent_width=32, heads=2, head_dim=16, gate_blocks=2, window=16, vocabulary=96
)


def small() -> Config:
    made = config()
    return dataclasses.replace(
        made,
        model=SMALL,
        data=dataclasses.replace(made.data, sequence_length=32),
        train=dataclasses.replace(made.train, dtype="float32", global_batch=BATCH),
    )


def test_a_step_is_measured_and_its_operators_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "WARM_UP", 0)
    step = count_step(small(), 1, DEVICES["h100"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model so small spends its time waiting for others
    found = measure_step(small(), {op.name for op in step.slowest.rank.ops}, repeats=1)
    torch.set_num_threads(threads)
    assert 0 < found.passes < 2 * found.step
    assert 0 < found.optimizer < 2 * found.step
    assert found.peak == found.kernels == 0  # there is no GPU
    assert {"mm", "griffin::rglru", "griffin::rglru_backward", "griffin::rms_norm"} <= found.operators.keys()
    assert found.others > 0


def test_operators_within_another_are_counted_once() -> None:
    def event(name: str, time: float, parent: Any = None) -> Any:
        times = {"device_time_total": 2 * time, "cpu_time_total": time}
        return SimpleNamespace(name=name, cpu_parent=parent, device_type=DeviceType.CPU, **times)

    outer = event("griffin::add_product", 5e6)
    hidden = event("other", 4e6, outer)
    events = [outer, hidden, event("aten::addmm", 3e6, hidden), event("aten::addmm", 1e6), event("aten::mm", 7e6)]
    for on_gpu, factor in ((False, 1), (True, 2)):
        found = operator_seconds(events, {"griffin::add_product", "addmm"}, on_gpu=on_gpu)
        assert found == {"griffin::add_product": 5 * factor, "addmm": factor}


def test_predicted_and_measured_are_beside_each_other() -> None:
    step = count_step(small(), 1, DEVICES["h100"])
    found = Measured(
        step=2 * step.total,
        passes=3 * step.micro_batches * step.slowest.total,
        optimizer=step.optimizer,
        peak=10**9,
        operators={"mm": 4 * step.micro_batches * step.slowest.by("name")["mm",]},
        others=5e-3,
        kernels=7 * step.micro_batches,
    )
    table = {line[:44].strip(): line[44:].split() for line in comparison(step, found)}
    assert table["step, ms"][2] == "2.00"
    assert table["forward and backward, ms"][2] == "3.00"
    assert table["optimizer, ms"][2] == "1.00"
    assert table["tokens/s"][2] == table["MFU, %"][2] == "0.50"
    assert table["memory at the peak, GB"][1] == "1.0"
    assert table["kernels per micro-batch"][1] == "7"
    assert table["mm"][2] == "4.00"
    assert table["griffin::rglru"][1:] == ["-", "-"]
    assert table["others"] == ["-", "5.00", "-"]


def test_a_step_that_does_not_fit_is_refused() -> None:
    step = count_step(small(), 1, DEVICES["h100"])
    needed = int(step.static_bytes + step.slowest.rank.peak)
    check_memory(step, needed)
    with pytest.raises(ValueError, match=r"^--measure: the step takes 0 GB by this count, the GPU has 0 GB"):
        check_memory(step, needed - 1)


def test_command_measures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, on a made-up GPU."""
    found = Measured(step=1.0, passes=0.9, optimizer=0.1, peak=10**9, operators={}, others=0.1, kernels=5)
    monkeypatch.setattr(measured, "prepare", lambda config, world: f"a GPU like an H200, of {world}")
    monkeypatch.setattr(measured, "measure_step", lambda config, names, repeats: found)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 10**12))
    assert main(["bench", "count", "griffin-100m", "--global-batch", "32", "--measure", "--repeats", "3"]) == 0
    printed = capsys.readouterr().out
    assert "\npredicted for H200 SXM 141 GB, measured on a GPU like an H200, of 1: means of 3 steps\n" in printed
    assert re.search(r"^step, ms +[\d,.]+ +1,000\.0 +[\d.]+$", printed, re.MULTILINE)


@pytest.mark.slow
def test_what_make_measures_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of `make bench-gpu`: both steps fit 80 GB with room for fragmentation."""
    listed = subprocess.run(
        ["make", "--dry-run", "--assume-old=setup", "bench-gpu"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert listed.returncode == 0, listed.stderr
    lines = re.findall(r"/griffin (bench .*) \|\| failed=1", listed.stdout)
    kernels, *steps = map(shlex.split, lines)
    assert main(kernels) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert len(steps) == 2
    for words in steps:
        assert words.pop() == "--measure"
        assert main([*words, "--world", "1"]) == 0
        printed = capsys.readouterr().out
        sizes = re.findall(r"^  (?:weights, float32|activations at) .* ([\d.]+)$", printed, re.MULTILINE)
        assert len(sizes) == 2
        assert sum(map(float, sizes)) < 0.8 * 78

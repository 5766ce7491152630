"""Training on one GPU against the same training on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import single_rank_grid
from griffin.trainer.step import Training
from tests.layouts import make_config, micro_batches

config = make_config(sys.argv[1], ParallelConfig(), dtype=sys.argv[2])
with single_rank_grid() as grid:
    training = Training(config, grid)
    losses = [training.step(iter(micro_batches(config, step, 0, 1))).loss for step in range(20)]
print(json.dumps({"device": grid.device.type, "loss": losses}))
"""

# Saves on the device after 3 steps; what a second training loads is compared bitwise.
RESUME = """
import json, sys
from pathlib import Path
import torch
from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import single_rank_grid
from griffin.trainer.checkpoint.checkpoints import Position
from griffin.trainer.step import Training
from tests.layouts import make_config
from tests.layout_checkpoints import checkpoints, source, state_of, steps

dtype, root = sys.argv[1], Path(sys.argv[2])
config = make_config("griffin", ParallelConfig(), dtype=dtype, steps=23)
with single_rank_grid() as grid:
    training = Training(config, grid)
    with checkpoints(config, grid, training, root) as saved:
        steps(training, grid, 0, 3)
        saved.save(Position(3, 24))
        state = state_of(training, grid)
        losses = steps(training, grid, 3, 10)
        saved.finish(Position(10, 80))
    again = Training(config, grid)
    with checkpoints(config, grid, again, root / "again") as saved:
        saved.load(source(root / "step-00000003", 3))
        loaded = state_of(again, grid)
        equal = all(torch.equal(loaded[name], value) for name, value in state.items())
        resumed = steps(again, grid, 3, 10)
print(json.dumps({"device": grid.device.type, "equal": equal, "loss": [losses, resumed]}))
"""


def losses_on(device: str, family: str, dtype: str) -> list[float]:
    return run_on(device, PROGRAM, family, dtype)["loss"]


def run_on(device: str, program: str, *arguments: str) -> dict[str, Any]:
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["device"] == device
    return answer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["griffin", "hawk", "mqa"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float32", 1e-4),  # float32 rounding over 20 Adam steps, with other kernels and sums in another order
        ("bfloat16", 3e-2),  # as between bfloat16 and float32 on the CPU
    ],
)
def test_one_gpu_agrees_with_the_cpu(family: str, dtype: str, tolerance: float) -> None:
    expected = losses_on("cpu", family, dtype)
    assert expected[-1] < 0.75 * expected[0]
    assert losses_on("cuda", family, dtype) == pytest.approx(expected, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_saves_and_loads_its_state(dtype: str, tmp_path: Path) -> None:
    answer = run_on("cuda", RESUME, dtype, str(tmp_path))
    assert answer["equal"]
    losses, resumed = answer["loss"]
    # Sums by atomic additions may come in another order: float32 rounding over 7 steps, of bfloat16 activations.
    assert resumed == pytest.approx(losses, rel=1e-4 if dtype == "float32" else 3e-2)


WAITS = """
import json, warnings
import torch
from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import single_rank_grid
from griffin.trainer.step import Training
from tests.layouts import make_config, micro_batches

config = make_config("griffin", ParallelConfig(), dtype="bfloat16")
waits = []
with single_rank_grid() as grid:
    training = Training(config, grid)
    for step, measure in enumerate((False, False, False, True)):  # the first ones compile
        batches = micro_batches(config, step, 0, 1)
        batches = [{name: value.pin_memory() for name, value in batch.items()} for batch in batches]
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            training.step(iter(batches), measure=measure, health=measure)
        torch.cuda.set_sync_debug_mode("default")
        waits.append([str(warning.message) for warning in raised if "synchronizing" in str(warning.message)])
print(json.dumps({"device": grid.device.type, "waits": waits}))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_waits_once_a_step() -> None:
    *_, plain, measured = run_on("cuda", WAITS)["waits"]
    assert len(plain) == 1, plain
    assert len(measured) <= 3, measured  # a copy of the host's figures to the device goes with the second wait


GRAPHS = """
import dataclasses, json, sys
import torch
from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import single_rank_grid
from griffin.trainer.step import Training
from tests.layouts import make_config, micro_batches

config = make_config("griffin", ParallelConfig(), dtype=sys.argv[1], cuda_graphs=sys.argv[2] == "on")
with single_rank_grid() as grid:
    training = Training(config, grid)
    losses, norms, held_out = [], [], []
    for step in range(10):  # the graph is captured in the fourth
        result = training.step(iter(micro_batches(config, step, 0, 1)), measure=step % 2 == 0)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step % 3 == 0:
            held_out.append(training.evaluate(iter(micro_batches(config, step, 0, 1)), 1)[0])
print(json.dumps({"device": grid.device.type, "loss": losses, "grad_norm": norms, "held_out": held_out}))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_trains_as_the_passes_that_it_replays(dtype: str) -> None:
    """Every step has other documents and evaluations come between; a stale tensor would repeat an earlier loss."""
    plain, graphed = (run_on("cuda", GRAPHS, dtype, graphs) for graphs in ("off", "on"))
    for name in ("loss", "grad_norm", "held_out"):
        assert len(set(plain[name])) == len(plain[name])
        # Sums by atomic additions may come in another order.
        assert graphed[name] == pytest.approx(plain[name], rel=1e-4 if dtype == "float32" else 3e-2)


REAL_SIZES = """
import dataclasses, json, sys
import torch
from griffin.parallel.config import ATTENTION, RECURRENT, ParallelConfig
from griffin.parallel.world.grid import single_rank_grid
from griffin.trainer.step import Training
from tests.layouts import make_config

made = make_config("griffin", ParallelConfig(), dtype=sys.argv[1], kernels=sys.argv[2], global_batch=4, steps=3)
model = dataclasses.replace(
    made.model, pattern=(RECURRENT, RECURRENT, ATTENTION), width=768, recurrent_width=1024, heads=6, head_dim=128,
    gate_blocks=16, window=1024, vocabulary=1000,
)
config = dataclasses.replace(made, model=model, data=dataclasses.replace(made.data, sequence_length=2048))
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(0, 1000, (2, 2049), generator=generator)
batch = {
    "tokens": tokens[:, :-1], "labels": tokens[:, 1:].contiguous(), "positions": torch.arange(2048).repeat(2, 1) % 777,
    "loss_mask": torch.ones(2, 2048),
}
with single_rank_grid() as grid:
    training = Training(config, grid)
    losses = [training.step(iter([batch, batch])).loss for _ in range(3)]
print(json.dumps({"device": grid.device.type, "loss": losses}))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])  # as above
def test_triton_trains_as_pytorch_does(dtype: str, tolerance: float) -> None:
    """The recurrent blocks of griffin-100m, 2048 tokens of three documents."""
    expected = run_on("cuda", REAL_SIZES, dtype, "cpu")["loss"]
    assert expected[-1] < expected[0]
    assert run_on("cuda", REAL_SIZES, dtype, "triton")["loss"] == pytest.approx(expected, rel=tolerance)


MEASURED = """
import dataclasses, json
from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import single_rank_grid
from griffin.trainer.step import Training
from tests.layouts import make_config, micro_batches

config = make_config("griffin", ParallelConfig())
with single_rank_grid() as grid:
    training = Training(config, grid)
    take, taken = training.clock.take, []
    training.clock.take = lambda: taken.append(take()) or taken[-1]
    results = [
        training.step(iter(micro_batches(config, step, 0, 1)), measure=step != 1, health=step != 1) for step in range(3)
    ]
print(json.dumps({
    "device": grid.device.type,
    "measured": [dict(results[step].measured) for step in (0, 2)],
    "health": [results[step].health.values() for step in (0, 2)],
    "times": [dataclasses.astuple(result.times) for result in results],
    "own": [dataclasses.asdict(own) for own in taken],
}))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured() -> None:
    expected, answer = run_on("cpu", MEASURED), run_on("cuda", MEASURED)
    for step in range(2):
        measured, on_cpu = answer["measured"][step], expected["measured"][step]
        for name in (name for name in measured if "norm" in name):
            assert measured[name] == pytest.approx(on_cpu[name], rel=1e-3), name
        assert 0 < measured["memory_allocated_gib"] <= measured["memory_peak_gib"] <= measured["memory_reserved_gib"]
        assert answer["health"][step] == pytest.approx(expected["health"][step], rel=1e-2)
    assert all(min(times) >= 0 for times in answer["times"])
    assert all(0 < own["work"] <= 1.01 * own["schedule"] for own in answer["own"])

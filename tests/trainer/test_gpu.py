"""Training on one GPU against the same training on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from griffin.parallel.config import ParallelConfig
from griffin.parallel.grid import single_rank_grid
from griffin.trainer.step import Training
from tests.parallel.test_layouts import make_config, micro_batches

config = make_config(sys.argv[1], ParallelConfig(), dtype=sys.argv[2])
with single_rank_grid() as grid:
    training = Training(config, grid)
    losses = [training.step(iter(micro_batches(config, step, 0, 1))).loss for step in range(20)]
print(json.dumps({"device": grid.device.type, "loss": losses}))
"""


def losses_on(device: str, family: str, dtype: str) -> list[float]:
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, family, dtype],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["device"] == device
    return answer["loss"]


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

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import Grid, single_rank_grid
from griffin.tools.bench.checkpoint import bench_config
from griffin.tools.bench.checkpoint_state import DcpState, fill, require_loaded
from griffin.tools.cli import main
from griffin.trainer.step import Training
from tests.checkpoints import MODEL_CONFIG

ROOT = Path(__file__).parents[3]
MEASURE = """
import sys
from pathlib import Path
from griffin.tools.bench.checkpoint import measure
from tests.checkpoints import MODEL_CONFIG
sys.exit(measure(MODEL_CONFIG, 2, 1, Path(sys.argv[1]), 2**30))
"""


@pytest.mark.slow
def test_every_figure_is_printed_and_nothing_is_left_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    sides = {
        "save": ("dcp",),
        "load, cold": ("dcp",),
        "load, warm": ("dcp",),
        "stall, 2 ranks": ("dcp thread", "dcp thread, kept", "dcp process"),
        "stall, 1 rank": ("dcp thread", "dcp thread, kept", "dcp process"),
    }
    for what, peers in sides.items():
        ours, *theirs = (
            float(re.search(rf"^{what} +{side} +([\d.]+) ms +[\d.]+ ", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
            for side in ("griffin", *peers)
        )
        for side, their in zip(peers, theirs, strict=True):
            (ratio,) = re.findall(rf"^{what} +ratio of {side} +([\d.]+) +\(rounds: ", done.stdout, re.MULTILINE)
            # Times are printed to a tenth of a millisecond, ratios to a hundredth.
            assert float(ratio) == pytest.approx(their / ours, rel=0.1, abs=0.02)
    assert list(tmp_path.iterdir()) == []


def training(grid: Grid) -> Training:
    made = Training(bench_config(MODEL_CONFIG, 1, ParallelConfig()), grid)
    fill(made, grid)
    return made


def test_nothing_is_timed_that_was_loaded_otherwise() -> None:
    with single_rank_grid() as grid:
        held = training(grid)
        require_loaded(held, grid)
        parameter = next(iter(held.stages[0].parameters()))
        shard = held.optimizer.shard_state(parameter)
        assert shard is not None
        for value in shard:
            assert value is not None
            with torch.no_grad():
                value.view(-1)[3] += 1
                with pytest.raises(
                    RuntimeError, match=r"griffin: .* was not loaded as it was saved; no load was timed"
                ):
                    require_loaded(held, grid)
                value.view(-1)[3] -= 1
        fill(held, grid)
        require_loaded(held, grid)

        peer = DcpState(held, grid, tensor_parallel=False)
        state = peer.state()
        peer.require_loaded(state)
        with pytest.raises(RuntimeError, match=r"dcp: weights\..* was not loaded as it was saved"):
            peer.require_loaded(peer.empty())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--folder", "/nonexistent"], "--folder /nonexistent: must be a folder"),
        (["--ranks", "7"], "parallel.tensor"),
        (["--model", "griffin-99m"], "griffin-99m"),
    ],
)
def test_refusals(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "checkpoint", *arguments]) == 2
    assert expected in capsys.readouterr().err

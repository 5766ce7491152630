"""Processes that convert and export: their imports, memory and reaction to signals."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig
from griffin.tools.bench.convert import require_equal, write_source
from griffin.trainer.checkpoint.manifest import read_manifest
from tests.small_runs import wait_for
from tests.transformers_models import convert, make_model, save_model

ROOT = Path(__file__).parents[3]
GIB = 2**30

IMPORTS = """
import sys
from griffin.tools.weights.hf.read import convert_transformers
from griffin.tools.weights.hf.write import export_transformers
from griffin.tools.common.workers import Workers, start_workers
from pathlib import Path

def has_torch(task):
    return "torch" in sys.modules

class Watched(Workers):
    def run(self, function, tasks, done):
        super().run(function, tasks, done)
        super().run(has_torch, range(8), self.found.append)

if __name__ == "__main__":
    source, step, target = map(Path, sys.argv[1:])
    with start_workers(2) as workers:
        workers.__class__, workers.found = Watched, []
        export_transformers(step, target, workers, shard_bytes=10**9)
        assert "torch" not in sys.modules
        convert_transformers(source, step.with_name("other"), workers)
        assert len(workers.found) == 16 and not any(workers.found)
"""


@pytest.mark.slow
def test_workers_import_no_torch(tmp_path: Path) -> None:
    """An export does not import torch in any process."""
    source = save_model(make_model(num_hidden_layers=1), tmp_path / "model")
    assert convert("hf", source, tmp_path / "step") == 0
    script = tmp_path / "script.py"
    script.write_text(IMPORTS)
    paths = [str(source), str(tmp_path / "step"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, str(script), *paths], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def model_of(blocks: int) -> ModelConfig:
    """Return a model of 14 MB in bfloat16 per block, and 61 MB for the embedding, its largest tensor."""
    return ModelConfig(
        pattern=(RECURRENT, RECURRENT, ATTENTION) * (blocks // 3),
        width=768,
        recurrent_width=768,
        heads=4,
        head_dim=192,
        gate_blocks=4,
        vocabulary=40_000,
        scale_embedding=True,
        logit_soft_cap=30.0,
    )


def resident(process: int) -> int:
    """Return the resident bytes of a process and its children, counting shared memory once."""
    total = 0
    for number in [process, *children(process)]:
        try:
            rollup = Path(f"/proc/{number}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        total += 1024 * int(found[1]) if (found := re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)) else 0
    return total


def children(process: int) -> list[int]:
    try:
        found = [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return found + [grandchild for child in found for grandchild in children(child)]


def peak(*words: Any) -> int:
    """Return the peak memory of a command, sampled every few milliseconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "griffin.tools.cli", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    most = 0
    while process.poll() is None:
        most = max(most, resident(process.pid))
        time.sleep(0.005)
    assert process.stderr is not None
    assert process.returncode == 0, process.stderr.read()
    process.stderr.close()
    return most


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_model(scratch: Path) -> None:
    """Seven times the blocks take the same memory: only a few chunks are held at a time.

    Seen: converting 463 and 462 MiB, most of it PyTorch in the process that plans; exporting 230 and 224.
    """
    sizes, peaks = {}, {}
    for blocks in (6, 42):
        source, step, target = (scratch / f"{name}-{blocks}" for name in ("model", "step", "out"))
        write_source(source, model_of(blocks))
        sizes[blocks] = (source / "model.safetensors").stat().st_size
        peaks["convert", blocks] = peak("convert", "hf", source, step, "--workers", 2)
        peaks["export", blocks] = peak("export", "hf", step, target, "--workers", 2)
        require_equal(source / "model.safetensors", target / "model.safetensors")
        largest = max(spec.nbytes for spec in read_manifest(step).arrays.values())
        for path in (source, step, target):
            shutil.rmtree(path)
        for command in ("convert", "export"):
            assert peaks[command, blocks] < largest + GIB
    assert sizes[42] > 4 * sizes[6]
    growth = sizes[42] - sizes[6]
    assert growth > 2**28
    for command in ("convert", "export"):
        assert peaks[command, 42] - peaks[command, 6] < growth / 4


def is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_signal_leaves_nothing(scratch: Path, command: str, number: signal.Signals) -> None:
    """While writing: SIGINT to the command and its workers, as a terminal sends it; SIGTERM to the command only."""
    source, step, target = (scratch / name for name in ("model", "step", "out"))
    write_source(source, model_of(12))
    if command == "export":
        assert convert("hf", source, step) == 0
    words = [command, "hf", str(source if command == "convert" else step), str(target), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "griffin.tools.cli", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    tmp = target.with_name("out.tmp")
    wait_for(lambda: tmp.exists() or process.poll() is not None)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert "compared with the source" not in output
    assert not target.exists()
    assert not tmp.exists()
    wait_for(lambda: not is_group(process.pid))  # nor is a worker left

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import griffin
import griffin.kernels.selection
import griffin.launch.local
import griffin.tools.commands.train
import griffin.tools.common.workers
from griffin.parallel.world.ranks import Ranks
from griffin.tools.cli import COMMANDS, main, report, split_overrides
from griffin.trainer.checkpoint.source import InitFrom
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.lock import RunLock
from griffin.trainer.settings.complete import load_config
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]

CONFIG = """
[model]
pattern = ["recurrent", "attention"]
width = 64
recurrent_width = 64
heads = 2
head_dim = 16
[parallel]
tensor = 2
[data]
sequence_length = 64
[train]
steps = 4
global_batch = 4
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config and data, and no launcher's environment variables."""
    (tmp_path / "small.toml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_ID", "SLURM_NTASKS", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(["data", "build", "data/bytes", "text.txt", "--tokenizer", "bytes", "--workers", "1"]) == 0
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Records the trainings started, as (ranks, config, run folder, --init-from), without running them."""
    calls: list[tuple[Any, ...]] = []

    def run_local(
        target: Any, ranks: int, args: tuple[Any, ...], *, preload: tuple[str, ...], save_seconds: float
    ) -> int:
        assert save_seconds == 900
        calls.append((ranks, *args))
        return 7

    monkeypatch.setattr(griffin.launch.local, "run_local", run_local)
    monkeypatch.setattr(griffin.tools.commands.train, "train_rank", lambda *args: calls.append(args))
    return calls


TRAIN = ["train", "small.toml", "--data.train", "data/bytes"]


def test_local_ranks(folder: Path, started: list) -> None:
    assert main([*TRAIN, "--ranks", "2", "--run-dir", "run", "--train.steps=9"]) == 7
    ((ranks, config, run_dir, init_from),) = started
    assert ranks == 2
    assert init_from is None
    assert (config.train.steps, config.model.vocabulary) == (9, 257)
    assert run_dir == Path("run")


def test_default_run_folder_and_ranks(folder: Path, started: list) -> None:
    assert main([*TRAIN, "--parallel.tensor", "1"]) == 7
    ((ranks, _, run_dir, _),) = started
    assert ranks == 1
    assert run_dir.match("runs/small-*")


def test_settings_may_stand_before_the_config(folder: Path, started: list) -> None:
    assert main(["train", "--data.train", "data/bytes", "--train.steps", "9", "small.toml", "--ranks", "2"]) == 7
    assert started[0][1].train.steps == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "absent.toml"], "absent.toml: no such config file"),
        (["train", "small.toml"], "data.train = []: must name at least one PREFIX"),
        (["train", "small.toml", "--data.train", "data/absent"], "data/absent"),
        ([*TRAIN, "--data.eval", "data/absent", "--ranks", "2"], "data/absent"),
        ([*TRAIN, "--ranks", "2", "--train.step", "3"], "train.step: no such setting; did you mean train.steps?"),
        ([*TRAIN, "--ranks", "2", "--model.vocabulary", "256"], "model.vocabulary = 256: the data's tokenizer has 257"),
        ([*TRAIN, "--data.sequence_length", "100000", "--ranks", "2"], "data.sequence_length = 100000: must be below"),
        ([*TRAIN, "--ranks", "3"], "world size = 3: must be a multiple of"),
        ([*TRAIN, "--ranks", "0"], "--ranks 0: must be at least 1"),
        ([*TRAIN, "--ranks", "2", "--run-dir", "data"], "--run-dir data: exists and is not an empty folder"),
        ([*TRAIN, "--ranks", "2", "--init-from", "absent"], "absent"),
        ([*TRAIN, "--ranks", "2", "--init-from", "data"], "data"),
        ([*TRAIN, "--ranks", "2", "--init-what", "all"], "--init-what all: needs --init-from CHECKPOINT"),
    ],
)
def test_refused_before_anything_starts(
    folder: Path, started: list, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("griffin: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert started == []
    assert sorted(folder.rglob("*")) == before


def test_kernels_that_cannot_run_are_refused_before_anything_starts(
    folder: Path, started: list, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(griffin.kernels.selection, "is_interpreted", lambda: False)
    assert main([*TRAIN, "--ranks", "2", "--train.kernels", "triton"]) == 2
    accepted = "accepted on a GPU, or with TRITON_INTERPRET=1"
    assert capsys.readouterr().err == f"griffin: error: train.kernels: 'triton' on cpu; {accepted}\n"
    assert started == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU refuses it")
def test_cuda_graphs_are_refused_before_anything_starts_without_a_gpu(
    folder: Path, started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, "--ranks", "2", "--train.cuda_graphs", "true", "--log.health_interval", "0"]) == 2
    refusal = "train.cuda_graphs = True: needs a GPU, the device is cpu; must be false"
    assert capsys.readouterr().err == f"griffin: error: {refusal}\n"
    assert started == []


@pytest.mark.parametrize(("backend", "accepted"), [("flex", "a GPU"), ("varlen", "NVIDIA GPUs of compute capability")])
def test_attention_that_cannot_run_is_refused_before_anything_starts(
    folder: Path, started: list, capsys: pytest.CaptureFixture[str], backend: str, accepted: str
) -> None:
    assert main([*TRAIN, "--ranks", "2", "--train.attention", backend]) == 2
    expected = f"griffin: error: train.attention: {backend!r} on cpu; accepted on {accepted}"
    assert capsys.readouterr().err.startswith(expected)
    assert started == []


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    """A checkpoint in the run folder "other", of the config's model with another initialization."""
    config = load_config(folder / "small.toml", ["--data.train", "data/bytes", "--model.init", "torch"])
    path = folder / "other/checkpoints/step-00000030"
    make_checkpoint(path, step=30, config=json.loads(json.dumps(dataclasses.asdict(config))))
    return path


@pytest.mark.parametrize(
    ("words", "everything"), [([], False), (["--init-what", "weights"], False), (["--init-what", "all"], True)]
)
def test_init_from(folder: Path, checkpoint: Path, started: list, words: list[str], everything: bool) -> None:
    assert main([*TRAIN, "--ranks", "2", "--init-from", "other", *words]) == 7
    assert started[0][3] == InitFrom(path=Path("other"), everything=everything)


def test_init_from_gives_the_model(
    folder: Path, checkpoint: Path, started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config without [model] takes the checkpoint's, also when the run resumes without --init-from."""
    there = load_config(folder / "small.toml", ["--data.train", "data/bytes", "--model.init", "torch"]).model
    (folder / "tune.toml").write_text(CONFIG.split("head_dim = 16")[1])
    tune = ["train", "tune.toml", "--data.train", "data/bytes", "--ranks", "2", "--run-dir", "run"]
    assert main(tune) == 2
    assert "model: must state model.pattern" in capsys.readouterr().err
    assert main([*tune, "--init-from", "other"]) == 7
    assert started[0][1].model == there
    RunFolder.create(folder / "run", started[0][1], {})
    assert main(tune) == 7
    assert started[1][1].model == there


def test_print_config(folder: Path, started: list, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([*TRAIN, "--print-config", "--train.dtype", "bf16"]) == 0
    (folder / "printed.toml").write_text(capsys.readouterr().out)
    assert load_config("printed.toml") == load_config("small.toml", ["--data.train", "data/bytes"])
    assert started == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"griffin-megatron {griffin.__version__}\n"


def test_checkpoints_that_do_not_fit_are_refused_before_anything_starts(
    folder: Path, checkpoint: Path, started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*words: str) -> str:
        before = sorted(folder.rglob("*"))
        assert main([*TRAIN, "--ranks", "2", *words]) == 2
        assert sorted(folder.rglob("*")) == before
        assert started == []
        return capsys.readouterr().err

    wider = ["--model.width", "128"]
    other_model = "other/checkpoints/step-00000030: holds another model (model.width is 64 there, 128 here)\n"
    assert refusal("--init-from", "other", *wider) == f"griffin: error: {other_model}"
    RunFolder.create(folder / "own", load_config(folder / "small.toml", ["--data.train", "data/bytes", *wider]), {})
    shutil.copytree(folder / "other/checkpoints", folder / "own/checkpoints")
    assert "own/checkpoints/step-00000030: holds another model" in refusal("--run-dir", "own", *wider)
    chunk = next(checkpoint.glob("model.*/c.*"))
    chunk.unlink()
    assert f"{chunk.relative_to(folder)} is missing" in refusal("--init-from", str(checkpoint.relative_to(folder)))


def test_a_run_that_another_process_writes_is_refused_before_anything_starts(
    folder: Path, started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLock.acquire(folder / "run"):
        assert main([*TRAIN, "--ranks", "2", "--run-dir", "run"]) == 2
        assert "run/lock: another run writes this folder" in capsys.readouterr().err
        assert started == []
    assert main([*TRAIN, "--ranks", "2", "--run-dir", "run"]) == 7


def test_more_local_ranks_than_gpus(
    folder: Path, started: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert main([*TRAIN, "--ranks", "4"]) == 2
    assert "--ranks 4: must be at most 3, the number of GPUs" in capsys.readouterr().err
    assert started == []


RANKS = Ranks(rank=1, world_size=2, local_rank=1, address="a", port=1, source="slurm", store_served=False)


def test_rank_of_a_launcher(folder: Path, started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(griffin.tools.commands.train, "discover", lambda: RANKS)
    (folder / "run").mkdir()
    (folder / "run/config.toml").write_text(CONFIG)  # as rank 0 may have made it by now
    assert main([*TRAIN, "--run-dir", "run"]) == 0
    ((ranks, config, run_dir, init_from),) = started
    assert init_from is None
    assert ranks == RANKS
    assert config.parallel.tensor == 2
    assert run_dir == Path("run")


class LeftError(Exception):
    pass


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `leave` raise instead of ending this process."""

    def leave(code: int) -> None:
        raise LeftError(code)

    monkeypatch.setattr(griffin.tools.commands.train, "leave", leave)
    monkeypatch.setattr(griffin.tools.commands.train, "discover", lambda: RANKS)


def test_rank_of_a_launcher_that_is_refused_leaves(
    folder: Path, started: list, leaving: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LeftError, match="2"):
        main([*TRAIN, "--train.steps", "0"])
    assert capsys.readouterr().err == "griffin: error: train.steps = 0: must be at least 1\n"
    assert started == []


def test_rank_of_a_launcher_that_fails_leaves(
    folder: Path, leaving: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("a loss that is not finite")

    monkeypatch.setattr(griffin.tools.commands.train, "train_rank", fail)
    with pytest.raises(LeftError, match="1"):
        main(TRAIN)
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("ValueError: a loss that is not finite\n")


@pytest.mark.parametrize("has_stopped", [False, True])
def test_rank_that_was_asked_to_stop(
    folder: Path, leaving: None, monkeypatch: pytest.MonkeyPatch, has_stopped: bool
) -> None:
    loop = ModuleType("griffin.trainer.loop")
    monkeypatch.setattr(loop, "train", lambda *args: has_stopped, raising=False)
    monkeypatch.setitem(sys.modules, "griffin.trainer.loop", loop)
    if has_stopped:
        with pytest.raises(LeftError, match="85"):  # at once: see what srun does with those that take longer
            main(TRAIN)
    else:
        assert main(TRAIN) == 0


def test_local_ranks_inside_of_a_launchers_rank(
    folder: Path, started: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(griffin.tools.commands.train, "discover", lambda: RANKS)
    assert main([*TRAIN, "--ranks", "2"]) == 2
    assert "--ranks 2: this process is one of 2 ranks that slurm started" in capsys.readouterr().err
    alone = Ranks(rank=0, world_size=1, local_rank=0, address="a", port=1, source="slurm", store_served=False)
    monkeypatch.setattr(griffin.tools.commands.train, "discover", lambda: alone)
    assert main([*TRAIN, "--ranks", "2"]) == 7  # an interactive shell that srun started


def test_allocation_of_several_tasks_without_srun(
    folder: Path, started: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert main(TRAIN) == 2
    assert "SLURM_NTASKS = 8, but this process was not started by srun" in capsys.readouterr().err
    assert main([*TRAIN, "--ranks", "2"]) == 2
    assert "not started by srun and --ranks is 2: start it with `srun griffin" in capsys.readouterr().err
    assert main([*TRAIN, "--ranks", "8", "--train.global_batch=8"]) == 7
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert main([*TRAIN, "--ranks", "8", "--train.global_batch=8"]) == 2
    assert "not started by srun and --ranks is 8" in capsys.readouterr().err


def test_dry_run_checks_and_starts_nothing(
    folder: Path, started: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")  # as in the batch script of a job
    assert main([*TRAIN, "--ranks", "4", "--run-dir", "run", "--dry-run"]) == 0
    assert main([*TRAIN, "--ranks", "3", "--run-dir", "run", "--dry-run"]) == 2
    assert "world size = 3: must be a multiple of" in capsys.readouterr().err
    assert started == []
    assert not Path("run").exists()


def test_split_overrides() -> None:
    words = ["train", "--a.b", "1", "c.toml", "--d.e=2", "x", "--ranks", "3", "--f.g", "--h.i", "-1", "--run-dir", "y"]
    rest, overrides = split_overrides(words)
    assert rest == ["train", "c.toml", "x", "--ranks", "3", "--run-dir", "y"]
    assert overrides == ["--a.b", "1", "--d.e=2", "--f.g", "--h.i", "-1"]


def test_settings_of_a_command_that_takes_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data", "inspect", "data/a", "--model.width", "3"])
    assert "unrecognized arguments: --model.width 3" in capsys.readouterr().err


def test_system_errors_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        (tmp_path / "absent").read_text()
    assert report(error.value) == 2
    assert capsys.readouterr().err == f"griffin: error: {tmp_path}/absent: No such file or directory\n"


def test_a_killed_worker_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """BrokenExecutor of any command's pool: concurrent.futures' or mpi4py's."""

    def fail(*args: Any) -> int:
        raise BrokenExecutor("A process in the process pool\nwas terminated abruptly")

    monkeypatch.setattr(griffin.tools.common.workers, "start_workers", fail)
    assert main(["convert", "hf", str(tmp_path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error == "griffin: error: a worker process was killed: out of memory? (try fewer --workers)\n"


def test_other_errors_keep_their_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> int:
        raise RuntimeError("not the user's mistake")

    monkeypatch.setattr(griffin.launch.local, "run_local", fail)
    with pytest.raises(RuntimeError, match="not the user's mistake"):
        main([*TRAIN, "--ranks", "2"])


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from griffin.tools.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert re.search(rf"^    {command}\b", result.stdout, flags=re.MULTILINE)

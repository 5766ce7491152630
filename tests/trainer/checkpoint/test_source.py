"""What a run starts from: its own checkpoints, then --init-from, then initial weights; damaged ones are named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from griffin.trainer.checkpoint.manifest import CheckpointError
from griffin.trainer.checkpoint.source import (
    FRESH,
    INIT_FROM,
    OWN,
    InitFrom,
    find_source,
    refuse_other_model,
)
from griffin.trainer.run.step_name import step_name
from tests.checkpoints import MODEL_CONFIG, config_json, make_checkpoint


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: "long" with the checkpoints of steps 100 and 200, "weights" with weights only, of step 300."""
    folder = tmp_path_factory.mktemp("originals")
    for step in (100, 200):
        make_checkpoint(folder / "long/checkpoints" / step_name(step), step=step)
    make_checkpoint(folder / "weights/checkpoints" / step_name(300), step=300, weights_only=True)
    return folder


@pytest.fixture
def runs(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals, tmp_path / "runs")


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / step_name(step)


def empty_a_chunk(run_dir: Path, step: int) -> Path:
    chunk = step_folder(run_dir, step) / "model.final_norm.weight" / "c.0"
    chunk.write_bytes(b"")
    return chunk


def test_nothing_to_load(tmp_path: Path) -> None:
    for run_dir in (tmp_path, tmp_path / "absent"):
        source = find_source(run_dir, None)
        assert (source.rule, source.path, source.everything, source.step) == (FRESH, None, False, 0)
        assert source.config is None
        assert source.skipped == ()
        assert source.text == "Weights: drawn from train.seed (no checkpoint)"


def test_the_runs_own_newest_checkpoint(runs: Path) -> None:
    source = find_source(runs / "long", None)
    assert (source.rule, source.everything, source.step) == (OWN, True, 200)
    assert source.path == step_folder(runs / "long", 200)
    assert source.config == config_json()
    assert source.skipped == ()
    assert source.text == f"Weights: step 200 of {runs}/long (the run's own folder)"


def test_the_own_folder_comes_before_init_from(runs: Path) -> None:
    """Even if the checkpoint that --init-from named at the first start is gone."""
    source = find_source(runs / "long", InitFrom(path=runs / "absent", everything=False))
    assert (source.rule, source.everything, source.step) == (OWN, True, 200)
    assert source.text.endswith(f"(the run's own folder; --init-from {runs}/absent is for its first start only)")


@pytest.mark.parametrize("named", ["long", "long/checkpoints", "long/checkpoints/step-00000100"])
@pytest.mark.parametrize("everything", [False, True])
def test_init_from(runs: Path, named: str, everything: bool) -> None:
    step = 100 if "step" in named else 200
    source = find_source(runs / "new", InitFrom(path=runs / named, everything=everything))
    assert source.path == step_folder(runs / "long", step)
    assert (source.rule, source.everything, source.step) == (INIT_FROM, everything, step if everything else 0)
    what = "optimizer state, step and place in the data as well" if everything else "weights only"
    assert source.text == f"Weights: step {step} of {runs}/long/checkpoints (--init-from; {what})"
    assert not (runs / "new").exists()


def test_damaged_checkpoints_of_the_run_are_skipped_and_named(runs: Path) -> None:
    chunk = empty_a_chunk(runs / "long", 200)
    make_checkpoint(step_folder(runs / "long", 400), step=400)
    (step_folder(runs / "long", 400) / "manifest.json").unlink()
    source = find_source(runs / "long", InitFrom(path=runs / "weights", everything=False))
    assert (source.rule, source.step, source.path) == (OWN, 100, step_folder(runs / "long", 100))
    newest, older = source.skipped
    assert "step-00000400/manifest.json" in newest
    assert older.startswith(f"{chunk} has 0 bytes")


def test_a_run_with_damaged_checkpoints_only_does_not_start_again(runs: Path) -> None:
    chunks = [empty_a_chunk(runs / "long", step) for step in (100, 200)]
    for init_from in (None, InitFrom(path=runs / "weights", everything=False)):
        with pytest.raises(
            CheckpointError, match="no checkpoint of this run is complete; move the folder away"
        ) as error:
            find_source(runs / "long", init_from)
        assert all(str(chunk) in str(error.value) for chunk in chunks)


def test_damaged_or_missing_init_from_is_refused(runs: Path) -> None:
    chunk = empty_a_chunk(runs / "long", 200)
    for path, message in (
        (step_folder(runs / "long", 200), f"{chunk} has 0 bytes"),
        (runs / "absent", f"{runs}/absent"),
        (runs, str(runs)),
    ):
        with pytest.raises(CheckpointError, match=message):
            find_source(runs / "new", InitFrom(path=path, everything=False))
    assert find_source(runs / "new", InitFrom(path=runs / "long", everything=True)).step == 100


def test_weights_only(runs: Path) -> None:
    source = find_source(runs / "new", InitFrom(path=runs / "weights", everything=False))
    assert (source.everything, source.step) == (False, 0)
    with pytest.raises(ValueError, match=r"step-00000300: holds weights only.*use --init-what weights"):
        find_source(runs / "new", InitFrom(path=runs / "weights", everything=True))
    with pytest.raises(ValueError, match=r"step-00000300: holds weights only.*start another run with --init-from"):
        find_source(runs / "weights", None)


def test_another_model_is_refused_with_its_differences() -> None:
    there = json.loads(json.dumps(dataclasses.asdict(MODEL_CONFIG)))
    refuse_other_model(MODEL_CONFIG, there)
    refuse_other_model(MODEL_CONFIG, there | {"init": "torch"})
    with pytest.raises(
        ValueError,
        match=r"^here: holds another model \(model\.pattern is \['recurrent'\] there, \['recurrent', 'attention', "
        r".*\] here, model\.width is 128 there, 8 here\)$",
    ):
        refuse_other_model(MODEL_CONFIG, there | {"init": "torch", "width": 128, "pattern": ["recurrent"]}, "here")

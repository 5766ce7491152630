"""The schedule of a resumed run, which is kept unless a change is asked for."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from griffin.trainer.optimizer import build_schedule, schedule_end
from griffin.trainer.schedule import PreviousRun
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.load import to_toml
from griffin.trainer.settings.sections import SCHEDULES, Config
from griffin.trainer.settings.validate import validate

MODEL = '[model]\npattern = ["recurrent"]\nwidth = 32\nrecurrent_width = 32\ngate_blocks = 2\nvocabulary = 257\n'
DATA = '[data]\ntrain = ["x"]\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(MODEL + DATA + "[train]\nsteps = 100\n")
    return tmp_path / "config.toml"


def rates(config: Config) -> list[float]:
    """The learning rate of every step."""
    validate(config, 1)
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = build_schedule(config, optimizer)  # type: ignore[arg-type]
    found = []
    for _ in range(config.train.steps):
        schedule.step(1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def previous_run(config: Config, step: int) -> PreviousRun:
    return PreviousRun(config=dataclasses.asdict(config), step=step)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("from_resolved_file", [False, True])
def test_more_steps_change_no_planned_step(path: Path, schedule: str, from_resolved_file: bool) -> None:
    """Before its end, and again; also with the config.toml of the run, which states every setting."""
    stated = ["--optimizer.schedule", schedule]
    first = load_config(path, stated)
    if from_resolved_file:
        path.write_text(to_toml(first))
    longer = load_config(path, [*stated, "--train.steps", "250"], previous=previous_run(first, 100))
    longest = load_config(path, [*stated, "--train.steps", "400"], previous=previous_run(longer, 180))
    least = first.optimizer.learning_rate if schedule == "constant" else first.optimizer.min_learning_rate
    assert rates(longest) == pytest.approx([*rates(first), *itertools.repeat(least, 300)])
    assert rates(longest)[:250] == rates(longer)
    if schedule != "constant":
        assert schedule_end(longest) == 100
    assert longest.train.steps == 400


def test_a_stable_phase_becomes_longer(path: Path) -> None:
    """A decay that has not begun moves to the new end, and keeps its length."""
    first = load_config(path, ["--optimizer.schedule", "wsd"])
    stated = ["--optimizer.schedule", "wsd", "--train.steps", "200"]
    assert (first.optimizer.warmup_steps, first.optimizer.decay_steps) == (10, 20)
    expected = rates(first)[:80] + [first.optimizer.learning_rate] * 100 + rates(first)[80:]
    assert rates(load_config(path, stated, previous=previous_run(first, 80))) == pytest.approx(expected)
    ended = load_config(path, stated, previous=previous_run(first, 81))
    assert rates(ended)[80:] == pytest.approx(rates(first)[80:] + [first.optimizer.min_learning_rate] * 100)
    # Told to, it decays once more.
    again = load_config(path, [*stated, "--optimizer.decay_steps=20"], previous=previous_run(ended, 100))
    assert rates(again) == pytest.approx(expected)


@pytest.mark.parametrize("by", ["command line", "file"])
@pytest.mark.parametrize(("key", "value"), [("warmup_steps", 10), ("decay_steps", 150), ("warmup_steps", 40)])
def test_requested_changes_of_the_schedule_are_made(path: Path, by: str, key: str, value: int) -> None:
    """On the command line, also a value that the run had already, or the default for so many steps."""
    first = load_config(path)
    settings = ["--train.steps", "400"]
    if by == "command line":
        settings += [f"--optimizer.{key}={value}"]
    else:
        path.write_text(path.read_text() + f"[optimizer]\n{key} = {value}\n")
    found = load_config(path, settings, previous=previous_run(first, 100)).optimizer
    kept = {"warmup_steps": 10, "decay_steps": 90}
    assert {name: getattr(found, name) for name in kept} == {**kept, key: value}
    validate(load_config(path, settings, previous=previous_run(first, 100)), 1)


def test_a_file_that_was_changed_since(path: Path) -> None:
    path.write_text(path.read_text() + "[optimizer]\nwarmup_steps = 5\n")
    first = load_config(path, ["--optimizer.warmup_steps=7"])
    assert load_config(path, previous=previous_run(first, 50)).optimizer.warmup_steps == 5
    assert load_config(path, previous=previous_run(load_config(path), 50)).optimizer.warmup_steps == 5


def test_another_schedule_decays_as_if_new(path: Path) -> None:
    first = load_config(path)
    found = load_config(
        path, ["--optimizer.schedule=wsd", "--train.steps=400"], previous=previous_run(first, 100)
    ).optimizer
    assert (found.warmup_steps, found.decay_steps, found.decay_end) == (10, 80, 0)


def test_checkpoints_without_a_later_setting(path: Path) -> None:
    """Also checkpoints of other programs, which have no settings at all."""
    first = dataclasses.asdict(load_config(path, ["--optimizer.schedule=wsd"]))
    del first["optimizer"]["decay_end"]
    settings = ["--optimizer.schedule=wsd", "--train.steps=400"]
    assert load_config(path, settings, previous=PreviousRun(config=first, step=100)).optimizer.decay_end == 100
    first["optimizer"] = {}
    found = load_config(path, settings, previous=PreviousRun(config=first, step=100)).optimizer
    assert (found.warmup_steps, found.decay_steps, found.decay_end) == (40, 80, 0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--optimizer.decay_end=90"], "optimizer.decay_end = 90: must be 0 for optimizer.schedule = 'cosine'"),
        (
            ["--optimizer.schedule=wsd", "--optimizer.decay_end=25"],
            "optimizer.decay_steps = 20: must be at most optimizer.decay_end - optimizer.warmup_steps = 15",
        ),
    ],
)
def test_impossible_decay_ends_are_refused(path: Path, settings: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        validate(load_config(path, settings), 1)

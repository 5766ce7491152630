"""Settings of other systems lead to ours."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

import pytest

from griffin.tools.cli import COMMANDS
from griffin.trainer.settings.sections import SECTIONS, TYPES
from griffin.trainer.settings.suggestions import ABSENT, OTHER_NAMES, OTHER_SECTIONS, suggest_section, suggest_setting

KNOWN = [f"{section}.{key}" for section, types in TYPES.items() for key in types]


def test_the_table_names_what_exists_and_each_other_name_once() -> None:
    assert set(OTHER_NAMES) <= set(KNOWN)
    assert set(OTHER_SECTIONS) <= set(SECTIONS)
    others = " ".join([*OTHER_NAMES.values(), *ABSENT.values()]).split()
    assert len(set(others)) == len(others)
    assert not set(others) & {setting.partition(".")[2] for setting in KNOWN}, "other names are none of ours"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("train.lr", "optimizer.learning_rate"),
        ("train.batch_size", "train.global_batch"),
        ("train.micro_batch_size", "train.micro_batch"),
        ("train.max_steps", "train.steps"),
        ("model.hidden_size", "model.width"),
        ("model.num_layers", "model.pattern"),
        ("data.seq_len", "data.sequence_length"),
        ("model.seq-len", "data.sequence_length"),
        ("parallel.tp", "parallel.tensor"),
        ("train.pp", "parallel.pipeline"),
        ("model.vocab_size", "model.vocabulary"),
        ("optimizer.grad_clip", "optimizer.clip"),
        ("train.window", "model.window"),  # ours, in the wrong section
        ("train.step", "train.steps"),
    ],
)
def test_setting_suggestions(written: str, meant: str) -> None:
    section, _, key = written.partition(".")
    assert suggest_setting(section, key, KNOWN) == f"did you mean {meant}?"


def test_suggestions_for_absent_settings() -> None:
    assert "parallel.tensor x parallel.pipeline leave" in suggest_setting("parallel", "dp", KNOWN)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("training", "train"),
        ("modle", "model"),
        ("architecture", "model"),
        ("Save", "checkpoint"),
        ("lr-scheduler", "optimizer"),
    ],
)
def test_section_suggestions(written: str, meant: str) -> None:
    assert suggest_section(written, SECTIONS) == meant


def dtype_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if "--dtype" in action.option_strings:
            yield action
        elif isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from dtype_actions(command)


def test_every_command_knows_every_name_of_a_dtype() -> None:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for name in COMMANDS:
        importlib.import_module(f"griffin.tools.commands.{name}").add_parser(subparsers)
    actions = list(dtype_actions(parser))
    assert len(actions) >= 6
    for action in actions:
        assert callable(action.type)
        for name in ("bf16", "bfloat16", "BF16", "torch.bfloat16"):
            assert action.type(name) == "bfloat16"
        with pytest.raises(argparse.ArgumentTypeError, match="must be one of float32"):
            action.type("int8")

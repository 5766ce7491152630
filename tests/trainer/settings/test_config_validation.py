from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from griffin.parallel.config import ModelConfig
from griffin.trainer.settings.sections import SETTINGS, Config, DataConfig
from griffin.trainer.settings.validate import validate

CONFIG = Config(
    model=ModelConfig(
        pattern=("recurrent", "recurrent", "attention", "recurrent"),
        width=64,
        recurrent_width=96,
        heads=8,
        head_dim=16,
        gate_blocks=16,
        vocabulary=257,
    ),
    data=DataConfig(train=("data/a",), sequence_length=256),
)
CONFIG = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, decay_steps=100))

GRAPHS = {"train.cuda_graphs": True, "log.health_interval": 0}


def changed(settings: dict[str, Any]) -> Config:
    config = CONFIG
    for setting, value in settings.items():
        section, key = setting.split(".")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ({}, 1),
        ({}, 256),
        ({"parallel.tensor": 8, "parallel.pipeline": 2}, 32),
        ({"parallel.tensor": 32, "model.heads": 32, "model.gate_blocks": 32, "model.vocabulary": 32_000}, 32),
        ({"parallel.tensor": 4, "parallel.sequence_parallel": True}, 4),
        ({"parallel.sequence_parallel": True, "data.sequence_length": 255}, 1),  # off on one tensor rank
        ({"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "train.micro_batch": 2}, 2),
        ({"parallel.pipeline": 2, "parallel.stages": (3, 1)}, 2),
        ({"model.pattern": ("recurrent",) * 4, "model.heads": 7, "model.head_dim": 3, "parallel.tensor": 2}, 2),
        ({"model.pattern": ("attention",) * 4, "model.gate_blocks": 7, "parallel.tensor": 2}, 2),
        ({"optimizer.schedule": "constant", "optimizer.decay_steps": 0, "optimizer.clip": 0.0}, 1),
        ({"optimizer.schedule": "wsd", "optimizer.warmup_steps": 9_900}, 1),
        ({"train.eval_interval": 0}, 1),
        ({"train.cuda_graphs": True, "log.health_interval": 0, "parallel.tensor": 2}, 4),
        ({"checkpoint.interval": 0, "checkpoint.keep_last": 0, "checkpoint.keep_every": 0}, 1),
        ({"checkpoint.keep_last": 1, "checkpoint.keep_every": 7}, 1),
    ],
)
def test_accepted(settings: dict[str, Any], world_size: int) -> None:
    validate(changed(settings), world_size)


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        # the model
        ({"model.pattern": ()}, 1, "model.pattern = []: must name at least one block's mixer"),
        (
            {"model.pattern": ("recurrent", "recurent")},
            1,
            "model.pattern = 'recurent': must be a list of recurrent, attention, global_attention",
        ),
        ({"model.gate_blocks": 10}, 1, "model.gate_blocks = 10: must divide model.recurrent_width = 96"),
        ({"model.head_dim": 18}, 1, "model.head_dim = 18: must be a multiple of 4"),
        ({"model.logit_soft_cap": -1.0}, 1, "model.logit_soft_cap = -1.0: must be 0 (off) or more"),
        # CUDA graphs
        *(
            (GRAPHS | settings, 2, f"train.cuda_graphs = True: excludes {message}")
            for settings, message in (
                ({"parallel.pipeline": 2}, "parallel.pipeline = 2; must be 1"),
                ({"train.overlap": "on"}, 'train.overlap = \'on\'; must be "off" or "auto"'),
                (
                    {"parallel.tensor": 2, "parallel.sequence_parallel": True},
                    "parallel.overlap_tensor = 'auto'; must be \"off\" with parallel.sequence_parallel",
                ),
                ({"train.attention": "varlen"}, 'train.attention = \'varlen\'; must be "flex" or "auto"'),
                ({"log.health_interval": 100}, "log.health_interval = 100; must be 0"),
                ({"log.profile_steps": (7,)}, "log.profile_steps = [7]; must be empty"),
            )
        ),
        # the layout
        (
            {"parallel.tensor": 3},
            3,
            "parallel.tensor = 3: must divide model.gate_blocks = 16 and model.heads = 8; accepted: 1, 2, 4, 8",
        ),
        (
            {"parallel.tensor": 16},
            16,
            "parallel.tensor = 16: must divide model.heads = 8; accepted: 1, 2, 4, 8",
        ),
        (
            {"parallel.tensor": 8, "model.gate_blocks": 12},
            8,
            "parallel.tensor = 8: must divide model.gate_blocks = 12; accepted: 1, 2, 4",
        ),
        (
            {"parallel.tensor": 8, "model.width": 52, "model.heads": 16},
            8,
            "parallel.tensor = 8: must divide the shards of the MLP width 156 = 12; accepted: 1, 2, 4",
        ),
        (
            {"parallel.tensor": 8, "parallel.sequence_parallel": True, "data.sequence_length": 100},
            8,
            "parallel.tensor = 8: must divide data.sequence_length (parallel.sequence_parallel is on) = 100; "
            "accepted: 1, 2, 4",
        ),
        (
            {"parallel.virtual_pipeline": 2},
            1,
            "parallel.virtual_pipeline = 2: must be 1 where parallel.pipeline is 1",
        ),
        (
            {"parallel.pipeline": 3, "parallel.virtual_pipeline": 2},
            3,
            "parallel.pipeline x parallel.virtual_pipeline = 3 x 2 = 6 stages: must be at most the number of blocks, 4",
        ),
        (
            {"parallel.pipeline": 2, "parallel.stages": (1, 1, 2)},
            2,
            "parallel.stages = [1, 1, 2]: must have 2 entries "
            "(parallel.pipeline x parallel.virtual_pipeline = 2 x 1), has 3",
        ),
        (
            {"parallel.pipeline": 2, "parallel.stages": (0, 4)},
            2,
            "parallel.stages = [0, 4]: each stage must hold at least 1 block",
        ),
        (
            {"parallel.pipeline": 2, "parallel.stages": (2, 3)},
            2,
            "parallel.stages = [2, 3]: must sum to the number of blocks, 4; sums to 5",
        ),
        (
            {"log.profile_steps": (0, 5)},
            1,
            "log.profile_steps = [0, 5]: must be from 1 to train.steps = ",
        ),
        (
            {"log.profile_ranks": (0, 2)},
            2,
            "log.profile_ranks = [0, 2]: must be from 0 to 1",
        ),
        # batches and ranks
        (
            {"parallel.tensor": 2, "parallel.pipeline": 2},
            6,
            "world size = 6: must be a multiple of parallel.tensor x parallel.pipeline = 2 x 2 = 4",
        ),
        ({}, 0, "world size = 0: must be a multiple of"),
        (
            {"train.global_batch": 10, "train.micro_batch": 2, "parallel.tensor": 2},
            8,
            "train.global_batch = 10: must be a multiple of train.micro_batch x data-parallel size = 2 x 4 = 8",
        ),
        (
            {"train.global_batch": 6, "train.micro_batch": 2, "parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
            2,
            "train.global_batch = 6: gives 3 micro-batches, which the interleaved schedule "
            "(parallel.virtual_pipeline > 1) needs to be a multiple of parallel.pipeline = 2: must be a multiple of 4",
        ),
        # the optimizer
        ({"optimizer.learning_rate": 0.0}, 1, "optimizer.learning_rate = 0.0: must be above 0"),
        ({"optimizer.learning_rate": float("nan")}, 1, "optimizer.learning_rate = nan: must be above 0"),
        (
            {"optimizer.min_learning_rate": 1.0},
            1,
            "optimizer.min_learning_rate = 1.0: must lie in 0 ... optimizer.learning_rate = 0.0003",
        ),
        ({"optimizer.beta1": 1.0}, 1, "optimizer.beta1 = 1.0: must be at least 0 and below 1"),
        ({"optimizer.beta2": -0.1}, 1, "optimizer.beta2 = -0.1: must be at least 0 and below 1"),
        ({"optimizer.epsilon": 0.0}, 1, "optimizer.epsilon = 0.0: must be above 0"),
        ({"optimizer.weight_decay": -0.1}, 1, "optimizer.weight_decay = -0.1: must be 0 (off) or more"),
        ({"optimizer.clip": float("inf")}, 1, "optimizer.clip = inf: must be 0 (off) or more"),
        ({"optimizer.warmup_steps": 10_001}, 1, "optimizer.warmup_steps = 10001: must be at most train.steps = 10000"),
        (
            {"optimizer.decay_steps": 0},
            1,
            "optimizer.decay_steps = 0: must be at least 1 for optimizer.schedule = 'cosine'",
        ),
        (
            {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 9_901},
            1,
            "optimizer.decay_steps = 100: must be at most train.steps - optimizer.warmup_steps = 99",
        ),
        # the data
        ({"data.train": ()}, 1, "data.train = []: must name at least one PREFIX"),
    ],
)
def test_refused(settings: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        validate(changed(settings), world_size)


@pytest.mark.parametrize("setting", [name for name, about in SETTINGS.items() if type(about.least) is int])
def test_bounds(setting: str) -> None:
    least, most = SETTINGS[setting].least, SETTINGS[setting].most
    assert least is not None
    assert most is not None
    for value, accepted in ((least - 1, f"at least {least}"), (most + 1, f"at most {most}")):
        with pytest.raises(ValueError, match=f"^{re.escape(setting)} = {value}: must be {accepted}$"):
            validate(changed({setting: value}), 1)


@pytest.mark.parametrize("setting", [name for name, about in SETTINGS.items() if about.choices])
def test_choices(setting: str) -> None:
    choices = SETTINGS[setting].choices
    message = f"{setting} = 'other': must be one of {', '.join(choices)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate(changed({setting: "other"}), 1)
    needed = {"parallel.sequence_parallel": True, "parallel.tensor": 2} if setting == "parallel.overlap_tensor" else {}
    for choice in choices:
        validate(changed({setting: choice} | needed), 2)


def test_vocabulary_must_have_been_found() -> None:
    with pytest.raises(ValueError, match=r"^model\.vocabulary: missing; must be stated, or completed from"):
        validate(changed({"model.vocabulary": None}), 1)

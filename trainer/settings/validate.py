"""Validation of a config: settings that cannot work are refused before anything starts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

from griffin.parallel.config import ModelConfig, axis_atoms
from griffin.parallel.mixers import MIXERS, used
from griffin.parallel.mixers.base import Multiple
from griffin.trainer.data.prefix import check_contents
from griffin.trainer.settings.complete import read_data
from griffin.trainer.settings.sections import SETTINGS, Config, OptimizerConfig

# Data sets up to this size are verified completely; of larger ones, some blocks.
CHECKED_TOKENS = 2**26

MOST_BLOCKS = 2**12
MOST_RANKS = 2**20
MOST_SAMPLES = 2**40  # of a training


def validate(config: Config, world_size: int) -> None:
    """Refuse a config that cannot work on `world_size` ranks.

    Only the config is checked; `validate_data` checks the data. Raises ValueError naming the setting, its value and
    what is accepted.
    """
    validate_settings(config, world_size)
    if not config.data.train:
        _refuse("data.train", [], "must name at least one PREFIX built by `griffin data build`")


def validate_settings(config: Config, world_size: int) -> None:
    """Like `validate`, for a config that need not name any data."""
    for setting in sorted(SETTINGS, key=lambda name: name != "train.steps"):  # other defaults depend on it
        section, _, key = setting.partition(".")
        _require_accepted(setting, getattr(getattr(config, section), key))
    validate_model(config.model)
    _validate_layout(config)
    _validate_batches(config, world_size)
    _validate_graphs(config)
    _validate_profiles(config, world_size)
    _validate_optimizer(config.optimizer, config.train.steps)
    _validate_spikes(config)


def validate_data(config: Config, *, contents: bool = True) -> None:
    """Refuse data that are missing, damaged or too short, and a vocabulary that is too small for them: ValueError.

    `contents` also compares the data with their checksums; one process per host does that.
    """
    data = list({info.prefix: info for info in read_data(config.data)}.values())
    vocabulary = data[0].vocabulary
    if config.model.vocabulary < vocabulary:
        accepted = f"the data's tokenizer has {vocabulary} tokens; must be at least that, or left out"
        _refuse("model.vocabulary", config.model.vocabulary, accepted)
    for info in data:
        if info.tokens <= config.data.sequence_length:
            accepted = f"must be below {info.tokens}, the number of tokens of {info.prefix}"
            _refuse("data.sequence_length", config.data.sequence_length, accepted)
        if contents:
            check_contents(info, whole=info.tokens <= CHECKED_TOKENS, seed=config.train.seed)


def _refuse(setting: str, value: Any, accepted: str) -> NoReturn:
    raise ValueError(f"{setting} = {value!r}: {accepted}")


def _require_accepted(setting: str, value: Any) -> None:
    """Refuse a value that the setting does not accept, whatever the other settings are."""
    if value is None:
        raise ValueError(f"{setting}: missing; must be stated, or completed from the data")
    if (accepted := SETTINGS[setting].refusal(value)) is not None:
        _refuse(setting, value, accepted)


def validate_model(model: ModelConfig) -> None:
    """Refuse a model that cannot be built: ValueError naming the setting, its value and what is accepted."""
    for field in dataclasses.fields(model):
        _require_accepted(f"model.{field.name}", getattr(model, field.name))
    if not model.pattern:
        _refuse("model.pattern", [], "must name at least one block's mixer")
    if model.blocks > MOST_BLOCKS:
        raise ValueError(f"model.pattern names {model.blocks} blocks: must be at most {MOST_BLOCKS}")
    for mixer in model.pattern:
        if mixer not in MIXERS:
            _refuse("model.pattern", mixer, f"must be a list of {', '.join(MIXERS)}")
    for mixer_type in used(model.pattern):
        for multiple in mixer_type.multiples:
            _require_multiple(model, multiple)


def _require_multiple(model: ModelConfig, multiple: Multiple) -> None:
    setting, value = f"model.{multiple.setting}", getattr(model, multiple.setting)
    if isinstance(multiple.of, str):
        if value % (divisor := getattr(model, multiple.of)):
            _refuse(f"model.{multiple.of}", divisor, f"must divide {setting} = {value}")
    elif value % multiple.of:
        _refuse(setting, value, f"must be a multiple of {multiple.of}: {multiple.why}")


def _validate_layout(config: Config) -> None:
    model, parallel = config.model, config.parallel
    sizes = {
        f"the shards of the MLP width {model.mlp_width}": axis_atoms(model.mlp_width),
        f"the shards of the padded vocabulary {model.padded_vocabulary}": axis_atoms(model.padded_vocabulary),
    }
    for mixer in used(model.pattern):
        sizes |= {f"model.{setting}": getattr(model, setting) for setting in mixer.shards}
    if parallel.sequence_parallel:
        sizes["data.sequence_length (parallel.sequence_parallel is on)"] = config.data.sequence_length
    undivided = [f"{name} = {size}" for name, size in sizes.items() if size % parallel.tensor]
    if undivided:
        common = math.gcd(*sizes.values())
        accepted = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
        _refuse("parallel.tensor", parallel.tensor, f"must divide {' and '.join(undivided)}; accepted: {accepted}")

    if parallel.overlap_tensor == "on" and not (parallel.sequence_parallel and parallel.tensor > 1):
        accepted = "needs parallel.tensor above 1 and parallel.sequence_parallel = true"
        _refuse("parallel.overlap_tensor", parallel.overlap_tensor, accepted)
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        accepted = "must be 1 where parallel.pipeline is 1"
        _refuse("parallel.virtual_pipeline", parallel.virtual_pipeline, accepted)
    count = parallel.pipeline * parallel.virtual_pipeline
    product = f"parallel.pipeline x parallel.virtual_pipeline = {parallel.pipeline} x {parallel.virtual_pipeline}"
    if count > model.blocks:
        raise ValueError(f"{product} = {count} stages: must be at most the number of blocks, {model.blocks}")
    if not parallel.stages:
        return
    stages = list(parallel.stages)
    if len(stages) != count:
        _refuse("parallel.stages", stages, f"must have {count} entries ({product}), has {len(stages)}")
    if min(stages) < 1:
        _refuse("parallel.stages", stages, "each stage must hold at least 1 block")
    if sum(stages) != model.blocks:
        _refuse("parallel.stages", stages, f"must sum to the number of blocks, {model.blocks}; sums to {sum(stages)}")


def _validate_profiles(config: Config, world_size: int) -> None:
    log = config.log
    for step in log.profile_steps:
        if not 1 <= step <= config.train.steps:
            _refuse(
                "log.profile_steps", list(log.profile_steps), f"must be from 1 to train.steps = {config.train.steps}"
            )
    for rank in log.profile_ranks:
        if not 0 <= rank < world_size:
            _refuse("log.profile_ranks", list(log.profile_ranks), f"must be from 0 to {world_size - 1}")


def _validate_graphs(config: Config) -> None:
    parallel, log = config.parallel, config.log
    if not config.train.cuda_graphs:
        return
    excluded = {
        f"parallel.pipeline = {parallel.pipeline}; must be 1": parallel.pipeline > 1,
        f'train.overlap = {config.train.overlap!r}; must be "off" or "auto"': config.train.overlap == "on",
        # Its barriers between ranks count their calls on the host.
        f'parallel.overlap_tensor = {parallel.overlap_tensor!r}; must be "off" with parallel.sequence_parallel': (
            parallel.sequence_parallel and parallel.tensor > 1 and parallel.overlap_tensor != "off"
        ),
        # The others read document offsets, whose number and longest document differ from batch to batch.
        f'train.attention = {config.train.attention!r}; must be "flex" or "auto"': config.train.attention
        not in ("auto", "flex"),
        f"log.health_interval = {log.health_interval}; must be 0": log.health_interval > 0,
        f"log.profile_steps = {list(log.profile_steps)}; must be empty": bool(log.profile_steps),
    }
    for reason, applies in excluded.items():
        if applies:
            _refuse("train.cuda_graphs", True, f"excludes {reason}")


def _validate_batches(config: Config, world_size: int) -> None:
    parallel, train = config.parallel, config.train
    if world_size > MOST_RANKS:
        _refuse("world size", world_size, f"must be at most {MOST_RANKS}")
    if world_size < 1 or world_size % parallel.model_ranks:
        names = " x ".join(f"parallel.{axis}" for axis in parallel.model_axes)
        sizes = " x ".join(map(str, parallel.model_axes.values()))
        accepted = f"must be a multiple of {names} = {sizes} = {parallel.model_ranks}"
        _refuse("world size", world_size, accepted)
    data_parallel = world_size // parallel.model_ranks
    if train.global_batch % (train.micro_batch * data_parallel):
        accepted = (
            f"must be a multiple of train.micro_batch x data-parallel size = "
            f"{train.micro_batch} x {data_parallel} = {train.micro_batch * data_parallel}"
        )
        _refuse("train.global_batch", train.global_batch, accepted)
    if train.steps * train.global_batch > MOST_SAMPLES:
        accepted = f"must be at most {MOST_SAMPLES // train.global_batch} for train.global_batch = {train.global_batch}"
        _refuse("train.steps", train.steps, accepted)
    micro_batches = train.global_batch // (train.micro_batch * data_parallel)
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        multiple = train.micro_batch * data_parallel * parallel.pipeline
        accepted = (
            f"gives {micro_batches} micro-batches, which the interleaved schedule (parallel.virtual_pipeline > 1) "
            f"needs to be a multiple of parallel.pipeline = {parallel.pipeline}: must be a multiple of {multiple}"
        )
        _refuse("train.global_batch", train.global_batch, accepted)


def _validate_optimizer(optimizer: OptimizerConfig, steps: int) -> None:
    peak = optimizer.learning_rate
    if optimizer.min_learning_rate > peak:
        accepted = f"must lie in 0 ... optimizer.learning_rate = {peak}"
        _refuse("optimizer.min_learning_rate", optimizer.min_learning_rate, accepted)
    if optimizer.warmup_steps > steps:
        _refuse("optimizer.warmup_steps", optimizer.warmup_steps, f"must be at most train.steps = {steps}")
    if optimizer.schedule != "constant" and optimizer.decay_steps < 1:
        accepted = f"must be at least 1 for optimizer.schedule = {optimizer.schedule!r}"
        _refuse("optimizer.decay_steps", optimizer.decay_steps, accepted)
    if optimizer.schedule != "wsd" and optimizer.decay_end:
        accepted = f'must be 0 for optimizer.schedule = {optimizer.schedule!r}; it is for "wsd"'
        _refuse("optimizer.decay_end", optimizer.decay_end, accepted)
    end, name = (optimizer.decay_end, "optimizer.decay_end") if optimizer.decay_end else (steps, "train.steps")
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + optimizer.decay_steps > end:
        accepted = f"must be at most {name} - optimizer.warmup_steps = {end - optimizer.warmup_steps}"
        _refuse("optimizer.decay_steps", optimizer.decay_steps, accepted)


def _validate_spikes(config: Config) -> None:
    if config.train.spike == "rewind" and config.checkpoint.interval == 0:
        _refuse(
            "checkpoint.interval", 0, 'must be at least 1 for train.spike = "rewind", which returns to a checkpoint'
        )

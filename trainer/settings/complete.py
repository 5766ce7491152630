"""Settings completed from the data: the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from griffin.parallel.config import ModelConfig
from griffin.trainer.data.prefix import DataInfo, read_blend
from griffin.trainer.schedule import PreviousRun
from griffin.trainer.settings.load import read_settings
from griffin.trainer.settings.sections import Config, DataConfig


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    find_model: Callable[[], ModelConfig | None] = lambda: None,
    previous: PreviousRun | None = None,
) -> Config:
    """Load a config with `read_settings`, and take the vocabulary from its data unless it states one.

    Raises what `read_settings` raises and, unless the vocabulary is stated, what `read_data` raises.
    """
    return complete(read_settings(path, overrides, find_model=find_model, previous=previous))


def complete(config: Config) -> Config:
    """`config` with the vocabulary of its data's tokenizer. If it states one, no data are read."""
    if config.model.vocabulary is not None:
        return config
    return with_vocabulary(config, read_data(config.data)[0].vocabulary)


def with_vocabulary(config: Config, vocabulary: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary=vocabulary))


def read_data(data: DataConfig) -> list[DataInfo]:
    """Read the headers and indexes of every prefix of `data.train`, then of `data.eval`.

    Raises ValueError if no data are named, if they are missing or damaged, or if their tokenizers differ.
    """
    if not data.train:
        raise ValueError("data.train = []: must name at least one PREFIX built by `griffin data build`")
    train = [info for _, info in read_blend(data.train)]
    held_out = []
    for name, blend in data.eval_sets.items():
        for _, info in read_blend(blend):
            held_out.append(info)
            if info.tokenizer == train[0].tokenizer:
                continue
            raise ValueError(
                f"data.eval{f'.{name}' * bool(name)} = {info.prefix!r}: built with tokenizer {info.tokenizer}, "
                f"data.train with {train[0].tokenizer}: all data of a run need the same"
            )
    return train + held_out

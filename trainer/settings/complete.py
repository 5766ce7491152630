"""Settings completed with what the data say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from griffin.parallel.config import ModelConfig
from griffin.trainer.data.prefix import DataInfo, read_blend
from griffin.trainer.schedule import Earlier
from griffin.trainer.settings.load import read_settings
from griffin.trainer.settings.sections import Config, DataConfig


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    find_model: Callable[[], ModelConfig | None] = lambda: None,
    earlier: Earlier | None = None,
) -> Config:
    """The config of `read_settings`, with the vocabulary of its data where it states none.

    Raises what `read_settings` raises, and, where the vocabulary is not stated, what `read_data` does.
    """
    return complete(read_settings(path, overrides, find_model=find_model, earlier=earlier))


def complete(config: Config) -> Config:
    """`config` with the vocabulary of its data's tokenizer; where it states one, no data are read."""
    if config.model.vocabulary is not None:
        return config
    return with_vocabulary(config, read_data(config.data)[0].vocabulary)


def with_vocabulary(config: Config, vocabulary: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary=vocabulary))


def read_data(data: DataConfig) -> list[DataInfo]:
    """Every prefix of `data.train`, then of `data.eval`, all of one tokenizer. Reads their headers and indexes.

    Raises ValueError where there are no data, where they are missing or damaged, or where tokenizers differ.
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

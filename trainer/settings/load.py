"""Loading settings from a TOML file, with overrides from the command line. No data are read: see `complete`."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from griffin.parallel.config import ModelConfig
from griffin.parallel.mixers import used
from griffin.trainer.dtypes import canonical_dtype
from griffin.trainer.files import SETTINGS_BYTES, parse_toml, read_regular
from griffin.trainer.schedule import PreviousRun, keep_schedule
from griffin.trainer.settings import eval_sets
from griffin.trainer.settings.eval_sets import EvalSets, read_eval_sets, with_set
from griffin.trainer.settings.presets import PRESETS, preset
from griffin.trainer.settings.sections import SECTIONS, TYPES, Config, OptimizerConfig
from griffin.trainer.settings.suggestions import suggest_section, suggest_setting

CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # packaged configs, found by their names

ACCEPTED = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple[str, ...]: "a string or a list of strings",
    tuple[int, ...]: "a list of integers",
    EvalSets: eval_sets.ACCEPTED,
}


def read_settings(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    find_model: Callable[[], ModelConfig | None] = lambda: None,
    previous: PreviousRun | None = None,
) -> Config:
    """Read a config from a TOML file, with `overrides` (["--train.steps", "10", "--model.window=64", ...]).

    `model.vocabulary` is None if it is not stated; `complete` takes it from the data.

    Args:
        path: a file, or the name of a packaged config (see `find_config`).
        find_model: called if neither a pattern nor a preset is stated; returns the model, or None.
        previous: the config and step of the run to resume, whose schedule is kept (see `keep_schedule`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a setting is wrong; the message names it, its value and what is accepted.
    """
    path = find_config(path)
    try:
        tables = parse_toml(read_regular(path, SETTINGS_BYTES).decode())
    except ValueError as error:  # of TOML or of the encoding
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    settings: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{section} = {table!r}: is outside of any section; {_nearest('', section)}")
        if section not in SECTIONS:
            raise ValueError(f"[{section}]: no such section; did you mean [{suggest_section(section, SECTIONS)}]?")
        for key, value in table.items():
            settings[section][key] = typed(section, key, value)
    overridden = {name: set[str]() for name in SECTIONS}
    for section, key, text in _split(overrides):
        key, _, name = key.partition(".")
        value = _parsed(section, key, text)
        settings[section][key] = with_set(settings[section].get(key, ()), name, value) if name else value
        overridden[section].add(key)
    if previous is not None:
        settings["optimizer"] = keep_schedule(
            settings["optimizer"], overridden["optimizer"], OptimizerConfig.schedule, previous
        )
    model = _resolve_model(settings.pop("model"), find_model)
    return Config(model=model, **{name: SECTIONS[name](**stated) for name, stated in settings.items()})


def find_config(path: str | Path) -> Path:
    """The file `path`, or else the packaged config of that name. FileNotFoundError if there is neither."""
    path = Path(path)
    packaged = {file.stem: file for file in sorted(CONFIGS.glob("*.toml"))}
    if not path.is_file() and str(path) in packaged:
        return packaged[str(path)]
    if path.exists():
        return path
    raise FileNotFoundError(f"{path}: no such config file, and no packaged config of that name: {', '.join(packaged)}")


def to_toml(config: Config) -> str:
    """TOML that states every setting, and loads as a Config equal to `config`."""
    return tomli_w.dumps(dataclasses.asdict(config))


def _nearest(section: str, key: str) -> str:
    return suggest_setting(section, key, [f"{name}.{known}" for name, types in TYPES.items() for known in types])


def _type(section: str, key: str) -> Any:
    if key not in TYPES.get(section, {}):
        raise ValueError(f"{section}.{key}: no such setting; {_nearest(section, key)}")
    return TYPES[section][key]


def typed(section: str, key: str, value: Any) -> Any:
    """Convert `value` to the type of its setting, or raise ValueError.

    As the setting requires, integers become floats, floats without a fraction become integers, lists become tuples, a
    string becomes a tuple of one, and the name of a dtype becomes its canonical name.
    """
    kind = _type(section, key)
    if kind is int and _is_integral(value):
        return int(value)
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if kind == EvalSets:
        return read_eval_sets(value)
    if kind == tuple[str, ...] and isinstance(value, str):
        return (value,)
    if isinstance(value, list) and typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        if element is int:
            value = [int(item) if _is_integral(item) else item for item in value]
        if all(type(item) is element for item in value):
            return tuple(value)
    elif type(value) is kind:  # not isinstance: a bool is no integer
        return canonical_dtype(value) if (section, key) == ("train", "dtype") else value
    raise ValueError(f"{section}.{key} = {value!r}: must be {ACCEPTED[kind]}")


def _is_integral(value: Any) -> bool:
    """Whether `value` is a float that is exactly one integer, such as 1e6. Above 2^53 it may stand for several."""
    return type(value) is float and value.is_integer() and abs(value) <= 2**53


def _parsed(section: str, key: str, text: str) -> Any:
    """The value of an override: parsed as TOML if that fits the setting, otherwise the text itself."""
    _type(section, key)
    try:
        table = parse_toml(f"value = {text}")
        if table.keys() == {"value"}:
            return typed(section, key, table["value"])
    except ValueError:
        pass
    return typed(section, key, text)


def _split(overrides: Sequence[str]) -> list[tuple[str, str, str]]:
    """(section, key, text) of each "--section.key=text" or "--section.key" "text"; several texts become a list."""
    words, split = list(overrides), []
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        section, dot, key = name.removeprefix("--").partition(".")
        if not name.startswith("--") or not dot:
            raise ValueError(f"{word}: must be --section.key value")
        setting, _, set_name = key.partition(".")
        is_set = set_name and (section, setting) == ("data", "eval")  # --data.eval.NAME
        kind = _type(section, setting if is_set else key)
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{section}.{key}: needs a value, {ACCEPTED[kind]}")
            text = words.pop(0)
            entries = [text]
            while words and not words[0].startswith("--"):
                entries.append(words.pop(0))
            if len(entries) > 1:
                text = json.dumps(entries, ensure_ascii=False)  # which is a list in TOML too
        split.append((section, key, text))
    return split


def _resolve_model(stated: dict[str, Any], find_model: Callable[[], ModelConfig | None]) -> ModelConfig:
    stated = dict(stated)
    name = stated.pop("preset", None)
    if name is not None:
        # A preset's vocabulary is for counting parameters. The vocabulary of a training is that of its data.
        settings = dataclasses.asdict(preset(name)) | {"vocabulary": None} | stated
    elif "pattern" in stated:
        settings = _fill_widths(stated)
    elif (model := find_model()) is not None:
        return ModelConfig(**dataclasses.asdict(model) | stated)
    else:
        raise ValueError(
            "model: must state model.pattern (a list of mixers) or model.preset ("
            f"{', '.join(PRESETS)}); with --init-from CHECKPOINT, the model is that of the checkpoint"
        )
    return ModelConfig(**settings)


def _fill_widths(stated: dict[str, Any]) -> dict[str, Any]:
    """Require the widths that the pattern's mixers use, and fill in the others."""
    needed = {"width"}.union(*(mixer.widths for mixer in used(stated["pattern"])))
    missing = sorted(f"model.{key}" for key in needed - stated.keys())
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing; model.pattern without model.preset needs them")
    return {"recurrent_width": stated["width"], "heads": 1, "head_dim": 128, **stated}

"""Everything that a run is made from: the sections of a TOML file, with overrides from the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from griffin.kernels.backends import AUTO
from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.trainer.data.prefix import DataInfo, read_blend
from griffin.trainer.dtypes import canonical_dtype
from griffin.trainer.files import SETTINGS_BYTES, parse_toml, read_regular
from griffin.trainer.schedule import Earlier, keep_schedule
from griffin.trainer.settings import eval_sets
from griffin.trainer.settings.eval_sets import Blend, EvalSets, read_eval_sets, with_set
from griffin.trainer.settings.presets import PRESETS, preset
from griffin.trainer.settings.suggestions import suggest_section, suggest_setting

CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # those that come along, each found by its name
SCHEDULES = ("cosine", "linear", "wsd", "constant")
WSD_DECAYS = ("linear", "cosine", "exponential", "minus_sqrt")
DTYPES = ("float32", "bfloat16")
OVERLAPS = ("auto", "on", "off")
SPIKES = ("off", "skip", "rewind")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[str, ...] = ()  # "PREFIX" or "WEIGHT PREFIX" of data built by `griffin data build`
    # The same, for held-out evaluation: one blend, or several by name, each evaluated; () or "none" is none.
    eval: EvalSets = field(default=(), hash=False)  # a dict has no hash
    sequence_length: int = 2048  # tokens per sequence
    cache: str = ""  # folder of the index caches; "" keeps them beside the data
    workers: int = 2  # loader processes per rank; 0 loads in the rank itself

    @property
    def eval_sets(self) -> dict[str, Blend]:
        """The blends of `eval` by name; one without a name is ""."""
        if isinstance(self.eval, dict):
            return self.eval
        return {"": self.eval} if self.eval else {}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; lengths are in optimizer steps."""

    learning_rate: float = 3e-4  # the peak
    min_learning_rate: float = 3e-5  # where the decay ends; left out of a file: a tenth of the peak
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm of the whole model; 0 is off
    schedule: str = "cosine"
    warmup_steps: int = 0  # left out of a file: a tenth of train.steps, at most 1000
    # Length of the decay: after the warm-up (cosine, linear), or at the end of training (wsd).
    # Left out of a file: all that follows the warm-up, or a fifth of train.steps for wsd.
    decay_steps: int = 0
    decay_end: int = 0  # step after which wsd's decay has ended; 0 is train.steps
    wsd_decay: str = "linear"  # shape of wsd's decay


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 10_000
    global_batch: int = 256  # sequences per optimizer step over all ranks
    micro_batch: int = 1  # sequences that a rank computes at a time
    seed: int = 0
    dtype: str = "bfloat16"  # of parameters and activations; master weights and gradients are float32
    recompute: str = "none"  # what each block computes again in its backward pass
    kernels: str = AUTO  # what computes convolution and recurrence
    overlap: str = "auto"  # data-parallel communication behind computation; auto: where there is a GPU
    eval_interval: int = 500  # optimizer steps between evaluations; 0 is never
    eval_batches: int = 10  # global batches per evaluation
    # What is done about a loss or gradient norm that is far above those of the steps before, or not finite: nothing
    # ("off": what is not finite ends the run), no update by that batch ("skip"), or back to the last checkpoint and on
    # with the data after the batch ("rewind").
    spike: str = "off"
    spike_deviations: float = 12.0  # robust standard deviations above the median that make a spike
    spike_window: int = 128  # steps that the median is of
    spike_limit: int = 10  # spikes within `spike_window` steps after which the run ends


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, besides at its end and when it is told to stop, and how long checkpoints are kept."""

    interval: int = 1000  # optimizer steps between checkpoints; 0 is none between
    keep_last: int = 0  # newest checkpoints that are kept; 0 keeps all
    keep_every: int = 0  # checkpoints whose step is a multiple are kept for good; 0 is none


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """How a run notices that hardware, not the user, has gone wrong."""

    preflight: bool = True  # check every rank's machine and links before the first step
    hang_seconds: float = 600.0  # a step that takes longer ends the run, with a report of who lags; 0 is off
    replica_interval: int = 1000  # optimizer steps between comparisons of data-parallel replicas' weights; 0 is never


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    interval: int = 10  # optimizer steps between logged steps; step 1 is always logged
    health_interval: int = 100  # optimizer steps between looks at the RG-LRU's gates; 0 is never
    peak_tflops: float = 0.0  # of one device, for the MFU; 0: the known figure of a GPU, elsewhere a measured one
    tensorboard: bool = True
    run_root: str = "runs"  # where run folders go that --run-dir does not name


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "health": HealthConfig,
    "log": LogConfig,
}
TYPES: dict[str, dict[str, Any]] = {name: typing.get_type_hints(section) for name, section in SECTIONS.items()}
TYPES["model"]["preset"] = str  # a setting of files only: a Config holds what it stands for

ACCEPTED = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple[str, ...]: "a string or a list of strings",
    tuple[int, ...]: "a list of integers",
    EvalSets: eval_sets.ACCEPTED,
}


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    find_model: Callable[[], ModelConfig | None] = lambda: None,
    needs_data: bool = True,
    earlier: Earlier | None = None,
) -> Config:
    """The config of a TOML file, changed by `overrides` (["--train.steps", "10", "--model.window=64", ...]).

    Defaults that depend on other settings are filled in: the vocabulary of the data's tokenizer (the only one that
    looks at the data), the preset's model, the learning rate's schedule.

    Args:
        path: a file, or the name of a packaged config (see `find_config`).
        find_model: asked for the model where neither a pattern nor a preset is stated; None where it has none.
        earlier: the config of the run that goes on, whose schedule is kept (see `keep_schedule`).
        needs_data: where the vocabulary is not stated and the data cannot be read, refuse; else take the preset's.

    Raises FileNotFoundError where there is no such file, and ValueError that names the setting, its value and what is
    accepted.
    """
    path = find_config(path)
    try:
        tables = parse_toml(read_regular(path, SETTINGS_BYTES).decode())
    except ValueError as error:  # of the decoder, or of the encoding
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    settings: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{section} = {table!r}: stands outside of any section; {_nearest('', section)}")
        if section not in SECTIONS:
            raise ValueError(f"[{section}]: no such section; did you mean [{suggest_section(section, SECTIONS)}]?")
        for key, value in table.items():
            settings[section][key] = typed(section, key, value)
    told = {name: set[str]() for name in SECTIONS}
    for section, key, text in _split(overrides):
        key, _, name = key.partition(".")
        value = _parsed(section, key, text)
        settings[section][key] = with_set(settings[section].get(key, ()), name, value) if name else value
        told[section].add(key)
    if earlier is not None:
        settings["optimizer"] = keep_schedule(
            settings["optimizer"], told["optimizer"], OptimizerConfig.schedule, earlier
        )
    return _resolve(settings, find_model, needs_data)


def find_config(path: str | Path) -> Path:
    """The file `path`, or where there is none, the packaged config of that name. FileNotFoundError if neither."""
    path = Path(path)
    packaged = {file.stem: file for file in sorted(CONFIGS.glob("*.toml"))}
    if not path.is_file() and str(path) in packaged:
        return packaged[str(path)]
    if path.exists():
        return path
    raise FileNotFoundError(f"{path}: no such config file, and none of those that come along: {', '.join(packaged)}")


def to_toml(config: Config) -> str:
    """TOML with every setting stated, which loads as a Config equal to `config`."""
    return tomli_w.dumps(dataclasses.asdict(config))


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


def _nearest(section: str, key: str) -> str:
    return suggest_setting(section, key, [f"{name}.{known}" for name, types in TYPES.items() for known in types])


def _type(section: str, key: str) -> Any:
    if key not in TYPES.get(section, {}):
        raise ValueError(f"{section}.{key}: no such setting; {_nearest(section, key)}")
    return TYPES[section][key]


def typed(section: str, key: str, value: Any) -> Any:
    """`value` as the setting's type: integers become floats, and floats without a fraction integers, lists tuples, a
    string a tuple of one, another name of a dtype the canonical one, where asked for.

    Raises ValueError where it is of another type.
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
    elif type(value) is kind:  # not isinstance: true is no integer
        return canonical_dtype(value) if (section, key) == ("train", "dtype") else value
    raise ValueError(f"{section}.{key} = {value!r}: must be {ACCEPTED[kind]}")


def _is_integral(value: Any) -> bool:
    """Whether `value` is a float that stands for one integer: 1e6. Above 2^53 it may stand for several."""
    return type(value) is float and value.is_integer() and abs(value) <= 2**53


def _parsed(section: str, key: str, text: str) -> Any:
    """The value of an override: TOML where that fits the setting, otherwise the text itself."""
    _type(section, key)
    try:
        table = parse_toml(f"value = {text}")
        if table.keys() == {"value"}:
            return typed(section, key, table["value"])
    except ValueError:
        pass
    return typed(section, key, text)


def _split(overrides: Sequence[str]) -> list[tuple[str, str, str]]:
    """(section, key, text) of each "--section.key=text", or "--section.key" followed by "text" or several (a list)."""
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
                text = json.dumps(entries, ensure_ascii=False)  # a list of TOML's too
        split.append((section, key, text))
    return split


def _resolve(
    settings: dict[str, dict[str, Any]], find_model: Callable[[], ModelConfig | None], needs_data: bool
) -> Config:
    data = DataConfig(**settings["data"])
    train = TrainConfig(**settings["train"])
    return Config(
        model=_resolve_model(settings["model"], data, find_model, needs_data),
        parallel=ParallelConfig(**settings["parallel"]),
        data=data,
        optimizer=_resolve_optimizer(settings["optimizer"], train.steps),
        train=train,
        checkpoint=CheckpointConfig(**settings["checkpoint"]),
        health=HealthConfig(**settings["health"]),
        log=LogConfig(**settings["log"]),
    )


def _resolve_model(
    stated: dict[str, Any], data: DataConfig, find_model: Callable[[], ModelConfig | None], needs_data: bool
) -> ModelConfig:
    stated = dict(stated)
    name = stated.pop("preset", None)
    if name is not None:
        settings = dataclasses.asdict(preset(name)) | stated
    elif "pattern" in stated:
        settings = _fill_widths(stated)
    elif (model := find_model()) is not None:
        return ModelConfig(**dataclasses.asdict(model) | stated)
    else:
        raise ValueError(
            "model: must state model.pattern (a list of mixers), or model.preset: "
            f"{', '.join(PRESETS)}; a training with --init-from CHECKPOINT takes the model from there"
        )
    # A preset's vocabulary is a figure for parameter counts; what the model trains on decides here.
    if "vocabulary" not in stated:
        try:
            settings["vocabulary"] = read_data(data)[0].vocabulary
        except (ValueError, OSError):
            if needs_data:
                raise
    return ModelConfig(**settings)


def _fill_widths(stated: dict[str, Any]) -> dict[str, Any]:
    """Demand the widths that the pattern's mixers use, and give the others a value."""
    needed = {"width"}
    if RECURRENT in stated["pattern"]:
        needed |= {"recurrent_width"}
    if {ATTENTION, GLOBAL_ATTENTION} & set(stated["pattern"]):
        needed |= {"heads", "head_dim"}
    missing = sorted(f"model.{key}" for key in needed - stated.keys())
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing; model.pattern without model.preset needs them")
    return {"recurrent_width": stated["width"], "heads": 1, "head_dim": 128, **stated}


def _resolve_optimizer(stated: dict[str, Any], steps: int) -> OptimizerConfig:
    settings = dict(stated)
    settings.setdefault("min_learning_rate", settings.get("learning_rate", OptimizerConfig.learning_rate) / 10)
    settings.setdefault("warmup_steps", max(0, min(1000, steps // 10)))
    schedule = settings.get("schedule", OptimizerConfig.schedule)
    decay = {"constant": 0, "wsd": max(1, steps // 5)}.get(schedule, max(1, steps - settings["warmup_steps"]))
    settings.setdefault("decay_steps", decay)
    return OptimizerConfig(**settings)

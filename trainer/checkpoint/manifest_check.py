"""Checks of a manifest's content before it is used: types, bounds, and names that stay within the step's folder.

The checksum is no protection against whoever made a checkpoint. Array names become paths that are read and written,
and sizes become allocations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from griffin.parallel.config import ModelConfig, ParallelConfig
from griffin.trainer.checkpoint.arrays import DTYPES, KINDS, ArraySpec
from griffin.trainer.files import is_integer
from griffin.trainer.settings.load import typed
from griffin.trainer.settings.sections import SECTIONS, SETTINGS
from griffin.trainer.settings.validate import validate_model

MOST_INTEGER = 2**62  # for counts of steps, samples and bytes
MOST_DIMENSIONS = 8
MOST_NAME = 200  # characters: file systems allow 255

# Name of a tensor: words of letters, digits and "_" joined by dots, so that it is one path component and never "..".
_TENSOR = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_CHECKSUM = re.compile(r"(crc32c:[0-9a-f]{8}|sha256:[0-9a-f]{64})")


def array_spec(name: str, values: Any) -> ArraySpec:
    """Check and build an array of a manifest. ValueError naming what is not accepted."""
    kind = next((kind for kind in KINDS if name.startswith(f"{kind}.")), None)
    tensor = name.removeprefix(f"{kind}.")
    if kind is None or len(name) > MOST_NAME or not _TENSOR.fullmatch(tensor):
        raise ValueError(f"{name!r} is no array's name")
    _require(isinstance(values, Mapping), f"arrays.{name}", values, "an object")
    shape, chunks = (values.get(key) for key in ("shape", "chunks"))
    axis, atoms, padded = (values.get(key) for key in ("axis", "atoms", "padded"))
    _require(_are_sizes(shape), f"{name}: shape", shape, f"1 to {MOST_DIMENSIONS} integers from 1 on")
    _require(math.prod(shape) <= MOST_INTEGER, f"{name}: shape", shape, f"of at most {MOST_INTEGER} elements")
    _require(axis is None or is_integer(axis, 0, len(shape) - 1), f"{name}: axis", axis, "one of its dimensions")
    most = padded if axis is not None and padded is not None else MOST_INTEGER
    _require(
        padded is None or (axis is not None and is_integer(padded, shape[axis], MOST_INTEGER)),
        f"{name}: padded",
        padded,
        "at least its axis' size",
    )
    sizes = [most if place == axis and padded is not None else size for place, size in enumerate(shape)]
    _require(
        _are_sizes(chunks) and len(chunks) == len(shape) and all(map(int.__le__, chunks, sizes)),
        f"{name}: chunks",
        chunks,
        "as many sizes as its shape has, not above them",
    )
    whole = sizes[axis] if axis is not None else 1
    _require(is_integer(atoms, 1, whole) and whole % atoms == 0, f"{name}: atoms", atoms, "a divisor of its axis' size")
    dtype = values.get("dtype")
    _require(isinstance(dtype, str) and dtype in DTYPES, f"{name}: dtype", dtype, f"one of {', '.join(DTYPES)}")
    return ArraySpec.from_json(name, values)


def check_header(values: Mapping[str, Any], known: Iterable[str], required: Iterable[str]) -> None:
    """Check the values of a manifest's header. ValueError naming the key that is not accepted.

    `known` are all keys that `values` may have, `required` those that it must have.
    """
    if missing := sorted(set(required) - values.keys()):
        raise ValueError(f"lacks {', '.join(missing)}")
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(f"has the unknown key {unknown[0]!r}")
    for key in ("step", "samples", "attempt"):
        _require(is_integer(values[key], 0, MOST_INTEGER), key, values[key], "an integer from 0 on")
    _require(isinstance(values["created"], str), "created", values["created"], "a string")
    for key in ("optimizer", "spikes"):
        found = values.get(key)
        _require(found is None or isinstance(found, Mapping), key, found, "an object or null")
    if values.get("spikes") is not None:
        _check_spikes(values["spikes"])
    _require(_is_mapping_to(values["random"], _is_text), "random", values["random"], "an object of strings")
    sources = values.get("sources", [])
    _require(isinstance(sources, list) and all(map(_is_text, sources)), "sources", sources, "a list of strings")
    extras = values.get("extras", {})
    _require(isinstance(extras, Mapping), "extras", extras, "an object")
    _check_layout(values["layout"])
    _check_config(values["config"])


def check_files(arrays: Mapping[str, ArraySpec], records: Any, group: str) -> None:
    """Check that there is one valid record for each file of the arrays and for `group`, the group's metadata."""
    _require(isinstance(records, Mapping), "files", records, "an object")
    # Compare counts before listing names: a manifest may claim any number of chunks.
    chunks = sum(math.prod(array.grid) for array in arrays.values())
    if chunks + len(arrays) + 1 != len(records):
        raise ValueError(f"has records of {len(records):,} files; its arrays have {chunks + len(arrays) + 1:,}")
    named = {group, *(array.metadata_file for array in arrays.values())}
    named |= {array.file(index) for array in arrays.values() for index in array.indices()}
    if unknown := sorted(records.keys() - named):
        raise ValueError(f"has a record of {unknown[0]!r}, which is no file of its arrays")
    for name, record in records.items():
        _require(
            isinstance(record, Mapping)
            and record.keys() == {"size", "checksum"}
            and is_integer(record["size"], 0, MOST_INTEGER)
            and isinstance(record["checksum"], str)
            and _CHECKSUM.fullmatch(record["checksum"]) is not None,
            f"files.{name}",
            record,
            "a size and a checksum",
        )


def _check_config(config: Any) -> None:
    """Check the settings of the run. Another version may lack some and have others, but not in the model's section."""
    _require(isinstance(config, Mapping), "config", config, "an object")
    for section in SECTIONS:
        stated = config.get(section, {})
        _require(isinstance(stated, Mapping), f"config.{section}", stated, "an object")
        names = {field.name for field in dataclasses.fields(SECTIONS[section])}
        if section == "model" and (unknown := sorted(stated.keys() - names)):
            raise ValueError(f"config.model.{unknown[0]} is no setting of a model that this version knows")
        for key, value in stated.items():
            if key in names:
                typed(section, key, value)


def model_of(config: Mapping[str, Any]) -> ModelConfig:
    """The architecture in the checked config of a manifest. ValueError if it is incomplete."""
    needed: dict[str, tuple[str, ...]] = {
        "model": ("pattern", "width", "recurrent_width", "heads", "head_dim", "vocabulary")
    }
    needed |= {"data": ("train", "sequence_length"), "parallel": ("stages",)}
    for section, keys in needed.items():
        if missing := [key for key in keys if key not in config.get(section, {})]:
            raise ValueError(f"lacks config.{section}.{missing[0]}")
    sequence, most = config["data"]["sequence_length"], _most("data.sequence_length")
    _require(is_integer(sequence, 1, most), "config.data.sequence_length", sequence, f"from 1 to {most}")
    model = ModelConfig(**config["model"] | {"pattern": tuple(config["model"]["pattern"])})
    validate_model(model)
    return model


def _check_layout(layout: Any) -> None:
    _require(isinstance(layout, Mapping), "layout", layout, "an object")
    for key in (*ParallelConfig().model_axes, "virtual_pipeline"):
        if key in layout:
            most = _most(f"parallel.{key}")
            _require(is_integer(layout[key], 1, most), f"layout.{key}", layout[key], f"an integer from 1 to {most}")


def _most(setting: str) -> int:
    most = SETTINGS[setting].most
    assert most is not None
    return int(most)


def _check_spikes(spikes: Mapping[str, Any]) -> None:
    """Check the state that `trainer.health.spikes.SpikeDetector.state` returns."""
    for key in ("losses", "log_grad_norms"):
        values = spikes.get(key, [])
        fits = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        _require(fits, f"spikes.{key}", values, "a list of numbers")
    steps = spikes.get("spikes", [])
    fits = isinstance(steps, list) and all(is_integer(step, 0, MOST_INTEGER) for step in steps)
    _require(fits, "spikes.spikes", steps, "a list of steps")
    for key in ("skipped", "rewinds"):
        _require(
            is_integer(spikes.get(key, 0), 0, MOST_INTEGER), f"spikes.{key}", spikes.get(key), "an integer from 0 on"
        )


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and 1 <= len(values) <= MOST_DIMENSIONS
        and all(is_integer(value, 1, MOST_INTEGER) for value in values)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping_to(values: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(values, Mapping) and all(map(is_right, values.values()))


def _require(fits: bool, what: str, value: Any, accepted: str) -> None:
    if not fits:
        text = repr(value)
        raise ValueError(f"{what} = {text if len(text) <= 80 else text[:80] + '...'}: must be {accepted}")

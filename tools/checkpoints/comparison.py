"""Compare two checkpoints: the output of `griffin checkpoint diff`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from griffin.tools.checkpoints.inspection import shape_text
from griffin.tools.checkpoints.sources import SourceCheckpoint, StoredArray, bits, open_step
from griffin.tools.common.workers import Workers
from griffin.trainer.checkpoint.arrays import MODEL, ArraySpec, Box
from griffin.trainer.checkpoint.manifest import Manifest
from griffin.trainer.checkpoint.steps import resolve

COMPARED_ELEMENTS = 2**20  # at a time, in float64
# Config sections that describe where and how a training runs and what it writes, not what it computes.
INFORMATIVE = ("parallel", "log", "checkpoint")


@dataclass(frozen=True)
class _CompareTask:
    """One box of two arrays of the same shape."""

    a: StoredArray
    b: StoredArray
    box: Box


@dataclass(frozen=True)
class Difference:
    """How many elements of two arrays differ in any bit, and the largest absolute and relative difference.

    A relative difference is relative to the larger magnitude of the two. Both are NaN where one of two differing
    elements is NaN.
    """

    name: str = ""
    elements: int = 0
    differing: int = 0
    absolute: float = 0.0
    relative: float = 0.0

    def merged(self, other: Difference) -> Difference:
        """The difference over the elements of both."""
        return Difference(
            other.name,
            self.elements + other.elements,
            self.differing + other.differing,
            float(np.maximum(self.absolute, other.absolute)),  # unlike max, it keeps NaN
            float(np.maximum(self.relative, other.relative)),
        )


def _compare(task: _CompareTask) -> Difference:
    a, b = task.a.read(task.box).ravel(), task.b.read(task.box).ravel()
    found = Difference(task.a.spec.name)
    for start in range(0, a.size, COMPARED_ELEMENTS):
        stop = start + COMPARED_ELEMENTS
        found = found.merged(difference(task.a.spec.name, a[start:stop], b[start:stop]))
    return found


def difference(name: str, a: np.ndarray, b: np.ndarray) -> Difference:
    differs = bits(a) != bits(b) if a.dtype == b.dtype else a.astype(np.float64) != b.astype(np.float64)
    if not differs.any():
        return Difference(name, a.size)
    x, y = a[differs].astype(np.float64), b[differs].astype(np.float64)
    with np.errstate(invalid="ignore"):
        absolute, larger = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
        relative = np.divide(absolute, larger, out=np.zeros_like(absolute), where=larger != 0)
    return Difference(name, a.size, x.size, float(absolute.max()), float(relative.max()))


def diff(a_path: Path, b_path: Path, workers: Workers, *, weights_only: bool = False) -> int:
    """Print the differences of two checkpoints: scalars, settings, and arrays. Returns 1 if there are any, else 0.

    Attempt, date, layout and the settings of INFORMATIVE sections are printed too, but do not count for the result.
    `weights_only` compares only the model's weights. Our own chunk reader is used: it runs in parallel, compares each
    chunk with the manifest's checksum, and keeps a few chunks per worker in memory.
    """
    a, b = open_step(resolve(a_path)), open_step(resolve(b_path))
    print(f"a: {a.path}\nb: {b.path}")
    lines, uncounted = ([], []) if weights_only else _setting_differences(a.manifest, b.manifest)
    names = [name for name in dict(a.arrays) | dict(b.arrays) if not weights_only or name.startswith(f"{MODEL}.")]
    common = []
    for name in names:
        x, y = a.manifest.arrays.get(name), b.manifest.arrays.get(name)
        if x is None or y is None:
            lines.append(f"{name}: only in {'b' if x is None else 'a'}")
        elif x.shape != y.shape:
            lines.append(f"{name}: shape {shape_text(x.shape)} in a, {shape_text(y.shape)} in b")
        else:
            common.append(name)
    found = _compare_arrays(a, b, common, workers)
    for name in common:
        lines += _difference_lines(found[name], a.manifest.arrays[name], b.manifest.arrays[name])
    for line in (*lines, *(f"{line} (does not count)" for line in uncounted)):
        print(line)
    equal = sum(
        found[name].differing == 0 and a.manifest.arrays[name].dtype == b.manifest.arrays[name].dtype for name in common
    )
    print(f"{equal:,} of {len(names):,} arrays are equal bit by bit")
    return int(bool(lines))


def _compare_arrays(
    a: SourceCheckpoint, b: SourceCheckpoint, names: Sequence[str], workers: Workers
) -> dict[str, Difference]:
    found = {name: Difference(name) for name in names}

    def tasks() -> Iterator[_CompareTask]:
        for name in names:
            x, y = a.arrays[name], b.arrays[name]
            larger = max(x.spec, y.spec, key=lambda spec: math.prod(spec.chunks))  # chunks are always read whole
            for index in larger.indices():
                yield _CompareTask(x, y, larger.box(index))

    elements = sum(a.manifest.arrays[name].tensor.elements for name in names)
    with tqdm(total=elements, desc="comparing", unit="", unit_scale=True, disable=None) as bar:

        def add(some: Difference) -> None:
            found[some.name] = found[some.name].merged(some)
            bar.update(some.elements)

        workers.run(_compare, tasks(), add)
    return found


def _difference_lines(found: Difference, a: ArraySpec, b: ArraySpec) -> list[str]:
    dtypes = f"{a.dtype} in a, {b.dtype} in b; " if a.dtype != b.dtype else ""
    if not found.differing:
        return [f"{a.name}: {dtypes}equal values"] if dtypes else []
    return [
        f"{a.name}: {dtypes}{found.differing:,} of {found.elements:,} elements differ, by at most "
        f"{found.absolute:.3g} ({found.relative:.3g} relative)"
    ]


def _setting_differences(a: Manifest, b: Manifest) -> tuple[list[str], list[str]]:
    """Differences in the training state and settings, and, as a second list, in how the run was laid out and saved."""
    counted, uncounted = (
        _value_differences({name: getattr(a, name) for name in names}, {name: getattr(b, name) for name in names})
        for names in (("step", "samples", "optimizer"), ("attempt", "created", "sources"))
    )
    if a.random != b.random:
        counted.append("random state: differs")
    uncounted += _value_differences(_flat({"layout": a.layout}), _flat({"layout": b.layout}))
    for section in sorted(a.config.keys() | b.config.keys()):
        x, y = (_flat({section: one.config.get(section, {})}) for one in (a, b))
        (uncounted if section in INFORMATIVE else counted).extend(_value_differences(x, y))
    return counted, uncounted


def _value_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {json.dumps(a[key]) if key in a else 'not set'} in a, "
        f"{json.dumps(b[key]) if key in b else 'not set'} in b"
        for key in dict(a) | dict(b)
        if key not in a or key not in b or a[key] != b[key]
    ]


def _flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, settings in config.items() for key, value in settings.items()}

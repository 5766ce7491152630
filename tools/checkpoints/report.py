"""What checkpoints hold, whether they are whole, and in what two of them differ."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from griffin.launch.local import cores
from griffin.parallel.config import ParallelConfig
from griffin.tools.checkpoints.stored import Source, StoredArray, bits, open_step
from griffin.tools.common.workers import Workers
from griffin.trainer.checkpoint.arrays import MODEL, ArraySpec, Box
from griffin.trainer.checkpoint.header import header_to_json
from griffin.trainer.checkpoint.manifest import Manifest, check, read_manifest, verify
from griffin.trainer.checkpoint.steps import resolve, steps
from griffin.trainer.checkpoint.zarr_io import CheckpointError

COMPARED_ELEMENTS = 2**20  # at a time, in float64
# Sections of a config that say where and how a training runs and what it writes: not what it computes.
INFORMATIVE = ("parallel", "log", "checkpoint")


def step_folders(path: Path) -> list[Path]:
    """A step's folder itself, or the steps of a checkpoints folder or of a run's folder, oldest first.

    Raises CheckpointError where there are none.
    """
    for root in (path, path / "checkpoints"):
        if found := steps(root):
            return [folder for _, folder in found]
    return [resolve(path)]  # which says what is missing


def show_list(paths: Sequence[Path]) -> None:
    """Print a line for each step: size, date, attempt, layout, and whether it is complete or else why not."""
    folders = [folder for path in paths for folder in step_folders(path)]
    width = max(len(str(folder)) for folder in folders)
    for folder in folders:
        facts = ""
        try:
            manifest = read_manifest(folder)
            facts = (
                f"{_size(manifest):>19,} bytes  {manifest.created[:19]:<19}  attempt {manifest.attempt:<3}  "
                f"{_layout(manifest)}"
            )
            check(folder)
        except CheckpointError as error:
            state = f"incomplete: {'; '.join(str(error).splitlines())}"
        else:
            state = "complete"
        print(f"{folder!s:<{width}}  {facts}  {state}")


def _size(manifest: Manifest) -> int:
    return sum(record.size for record in manifest.files.values())


def _layout(manifest: Manifest) -> str:
    sizes = {axis: str(manifest.layout.get(axis, 1)) for axis in (*ParallelConfig().model_axes, "data")}
    sizes["pipeline"] += f" x {manifest.layout['virtual_pipeline']}"
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())


def show(path: Path, as_json: bool) -> None:
    """Print everything that a checkpoint holds but the elements of its arrays."""
    folder = resolve(path)
    manifest = read_manifest(folder)
    arrays = manifest.arrays.values()
    totals = {
        "parameters": sum(array.tensor.elements for array in arrays if array.kind == MODEL),
        "bytes": sum(array.nbytes for array in arrays),
        "files": len(manifest.files),
    }
    if as_json:
        values = {key: value for key, value in header_to_json(manifest).items() if key != "random"}
        described = {
            name: array.to_json() | {"bytes": array.nbytes, "files": math.prod(array.grid)}
            for name, array in manifest.arrays.items()
        }
        print(json.dumps({"path": str(folder)} | values | {"arrays": described, "totals": totals}, indent=2))
        return
    print(f"path       {folder}")
    for name in ("step", "samples", "attempt", "created"):
        print(f"{name:<10} {getattr(manifest, name)}")
    print(f"layout     {_words(manifest.layout)}")
    print(f"optimizer  {_words(manifest.optimizer) if manifest.optimizer else 'none: weights only'}")
    for source in manifest.sources:
        print(f"made from  {source}")
    for section, settings in manifest.config.items():
        print(f"\n[{section}]")
        for key, value in settings.items():
            print(f"{key} = {json.dumps(value)}")
    print()
    _print_table(
        ("array", "shape", "dtype", "bytes", "chunks"),
        [
            (
                name,
                _shape(array.shape),
                array.dtype,
                f"{array.nbytes:,}",
                f"{math.prod(array.grid)} x {_shape(array.chunks)}",
            )
            for name, array in manifest.arrays.items()
        ],
    )
    print(
        f"\n{len(arrays):,} arrays, {totals['parameters']:,} parameters, {totals['bytes']:,} bytes, "
        f"{totals['files']:,} files"
    )


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _shape(sizes: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def verify_all(paths: Sequence[Path], workers: int | None) -> int:
    """Read every step at `paths` whole, with so many threads (default: one per core). Returns 1 if one is damaged."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    code = 0
    for folder in [folder for path in paths for folder in step_folders(path)]:
        begun = time.monotonic()
        try:
            size = _size(read_manifest(folder))
            with tqdm(total=size, desc=folder.name, unit="B", unit_scale=True, disable=None) as bar:
                verify(folder, progress=bar.update, workers=workers or cores())
        except CheckpointError as error:
            print(f"{folder}: damaged\n{error}", file=sys.stderr)
            code = 1
        else:
            seconds = time.monotonic() - begun
            print(f"{folder}: ok, {size:,} bytes in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)")
    return code


@dataclass(frozen=True)
class _Pair:
    """The same box of two arrays."""

    a: StoredArray
    b: StoredArray
    box: Box


@dataclass(frozen=True)
class Difference:
    """Of some elements of two arrays: how many differ in a bit, and the largest differences among them.

    Relative ones are to the larger of both magnitudes. Both are NaN where one of two differing elements is.
    """

    name: str = ""
    elements: int = 0
    differing: int = 0
    absolute: float = 0.0
    relative: float = 0.0

    def joined(self, other: Difference) -> Difference:
        return Difference(
            other.name,
            self.elements + other.elements,
            self.differing + other.differing,
            float(np.maximum(self.absolute, other.absolute)),  # unlike max, it keeps NaN
            float(np.maximum(self.relative, other.relative)),
        )


def _compare(pair: _Pair) -> Difference:
    a, b = pair.a.read(pair.box).ravel(), pair.b.read(pair.box).ravel()
    found = Difference(pair.a.spec.name)
    for start in range(0, a.size, COMPARED_ELEMENTS):
        stop = start + COMPARED_ELEMENTS
        found = found.joined(difference(pair.a.spec.name, a[start:stop], b[start:stop]))
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
    """Print in what two checkpoints differ: scalars, settings, and array by array. Returns 1 if they do, else 0.

    What does not count for the result is printed too: attempt, date, layout, and the settings of INFORMATIVE sections.
    With `weights_only`, the model's weights alone are looked at. A worker has a few chunks in memory.
    """
    a, b = open_step(resolve(a_path)), open_step(resolve(b_path))
    print(f"a: {a.path}\nb: {b.path}")
    lines, uncounted = ([], []) if weights_only else _differing_settings(a.manifest, b.manifest)
    wanted = [name for name in dict(a.arrays) | dict(b.arrays) if not weights_only or name.startswith(f"{MODEL}.")]
    both = []
    for name in wanted:
        x, y = a.manifest.arrays.get(name), b.manifest.arrays.get(name)
        if x is None or y is None:
            lines.append(f"{name}: only in {'b' if x is None else 'a'}")
        elif x.shape != y.shape:
            lines.append(f"{name}: shape {_shape(x.shape)} in a, {_shape(y.shape)} in b")
        else:
            both.append(name)
    found = _compare_arrays(a, b, both, workers)
    for name in both:
        lines += _described(found[name], a.manifest.arrays[name], b.manifest.arrays[name])
    for line in (*lines, *(f"{line} (does not count)" for line in uncounted)):
        print(line)
    equal = sum(
        found[name].differing == 0 and a.manifest.arrays[name].dtype == b.manifest.arrays[name].dtype for name in both
    )
    print(f"{equal:,} of {len(wanted):,} arrays are equal bit by bit")
    return int(bool(lines))


def _compare_arrays(a: Source, b: Source, names: Sequence[str], workers: Workers) -> dict[str, Difference]:
    found = {name: Difference(name) for name in names}

    def pairs() -> Iterator[_Pair]:
        for name in names:
            x, y = a.arrays[name], b.arrays[name]
            larger = max(x.spec, y.spec, key=lambda spec: math.prod(spec.chunks))  # a chunk is read whole each time
            for index in larger.indices():
                yield _Pair(x, y, larger.box(index))

    elements = sum(a.manifest.arrays[name].tensor.elements for name in names)
    with tqdm(total=elements, desc="comparing", unit="", unit_scale=True, disable=None) as bar:

        def done(some: Difference) -> None:
            found[some.name] = found[some.name].joined(some)
            bar.update(some.elements)

        workers.run(_compare, pairs(), done)
    return found


def _described(found: Difference, a: ArraySpec, b: ArraySpec) -> list[str]:
    dtypes = f"{a.dtype} in a, {b.dtype} in b; " if a.dtype != b.dtype else ""
    if not found.differing:
        return [f"{a.name}: {dtypes}equal values"] if dtypes else []
    return [
        f"{a.name}: {dtypes}{found.differing:,} of {found.elements:,} elements differ, by at most "
        f"{found.absolute:.3g} ({found.relative:.3g} relative)"
    ]


def _differing_settings(a: Manifest, b: Manifest) -> tuple[list[str], list[str]]:
    """In what a training continues from, and in its settings; and, apart, in how it was run and saved."""
    counted, uncounted = (
        _differing({name: getattr(a, name) for name in names}, {name: getattr(b, name) for name in names})
        for names in (("step", "samples", "optimizer"), ("attempt", "created", "sources"))
    )
    if a.random != b.random:
        counted.append("random state: differs")
    uncounted += _differing(_flat({"layout": a.layout}), _flat({"layout": b.layout}))
    for section in sorted(a.config.keys() | b.config.keys()):
        x, y = (_flat({section: one.config.get(section, {})}) for one in (a, b))
        (uncounted if section in INFORMATIVE else counted).extend(_differing(x, y))
    return counted, uncounted


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {json.dumps(a[key]) if key in a else 'not set'} in a, "
        f"{json.dumps(b[key]) if key in b else 'not set'} in b"
        for key in dict(a) | dict(b)
        if key not in a or key not in b or a[key] != b[key]
    ]


def _flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, settings in config.items() for key, value in settings.items()}

"""List, inspect and verify checkpoints: the output of `griffin checkpoint list`, `inspect` and `verify`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from griffin.launch.local import cores
from griffin.parallel.config import ParallelConfig
from griffin.trainer.checkpoint.arrays import MODEL, ArraySpec, numpy_dtype
from griffin.trainer.checkpoint.header import header_to_json
from griffin.trainer.checkpoint.manifest import Manifest, check, read_manifest, verify
from griffin.trainer.checkpoint.steps import resolve, steps
from griffin.trainer.checkpoint.zarr_io import CheckpointError, open_array

READ_ELEMENTS = 2**24  # values read at a time for statistics, or one row of chunks if larger
COUNTED_ELEMENTS = 2**20  # of them, in float64 at a time
EDGE = 3  # values printed at each end of an axis


def step_folders(path: Path) -> list[Path]:
    """Return `path` if it is a step's folder, else the steps of that run or checkpoints folder, oldest first.

    Raises CheckpointError if there are none.
    """
    for root in (path, path / "checkpoints"):
        if found := steps(root):
            return [folder for _, folder in found]
    return [resolve(path)]  # its error says what is missing


def print_list(paths: Sequence[Path]) -> None:
    """Print one line per step: size, date, attempt, layout, and "complete" or what is missing."""
    folders = [folder for path in paths for folder in step_folders(path)]
    width = max(len(str(folder)) for folder in folders)
    for folder in folders:
        facts = ""
        try:
            manifest = read_manifest(folder)
            facts = (
                f"{_total_bytes(manifest):>19,} bytes  {manifest.created[:19]:<19}  attempt {manifest.attempt:<3}  "
                f"{_layout_text(manifest)}"
            )
            check(folder)
        except CheckpointError as error:
            state = f"incomplete: {'; '.join(str(error).splitlines())}"
        else:
            state = "complete"
        print(f"{folder!s:<{width}}  {facts}  {state}")


def _total_bytes(manifest: Manifest) -> int:
    return sum(record.size for record in manifest.files.values())


def _layout_text(manifest: Manifest) -> str:
    sizes = {axis: str(manifest.layout.get(axis, 1)) for axis in (*ParallelConfig().model_axes, "data")}
    sizes["pipeline"] += f" x {manifest.layout.get('virtual_pipeline', 1)}"
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())


def print_checkpoint(path: Path, as_json: bool) -> None:
    """Print a checkpoint's metadata, settings and a table of its arrays; their values are not read."""
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
            (name, shape_text(array.shape), array.dtype, f"{array.nbytes:,}", _chunks_text(array))
            for name, array in manifest.arrays.items()
        ],
    )
    print(
        f"\n{len(arrays):,} arrays, {totals['parameters']:,} parameters, {totals['bytes']:,} bytes, "
        f"{totals['files']:,} files"
    )


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def shape_text(sizes: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"


def _chunks_text(array: ArraySpec) -> str:
    return f"{math.prod(array.grid)} x {shape_text(array.chunks)}"


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def print_array(path: Path, name: str, as_json: bool) -> None:
    """Print an array's shape, dtype, chunks, sharded axis, statistics, and the values at its corners.

    Stock Zarr reads the values, READ_ELEMENTS or one row of chunks at a time. The manifest, all file sizes and the
    array's metadata are checked before: Zarr takes missing chunks for zeros, and any codec that the metadata name.
    Raises ValueError for an unknown name, and CheckpointError for damage.
    """
    import zarr

    folder = resolve(path)
    manifest = check(folder)
    spec = manifest.arrays.get(name)
    if spec is None:
        close = get_close_matches(name, manifest.arrays, n=1) or [next(iter(manifest.arrays))]
        raise ValueError(f"--array {name}: must be an array of {folder}, such as {close[0]}")
    open_array(folder, spec)
    # Consolidated metadata are the group's own, which nothing has compared with the manifest.
    array: Any = zarr.open_group(folder, mode="r", use_consolidated=False)[name]
    try:
        statistics = statistics_of(_read_blocks(array, spec))
        corner = _read_corner(array, spec)
    except ValueError as error:  # a chunk does not match its checksum
        raise CheckpointError(f"{folder / name}: {error}; `griffin checkpoint verify` names the file") from None
    if as_json:
        described = spec.to_json() | {"bytes": spec.nbytes, "files": math.prod(spec.grid)}
        print(json.dumps({"path": str(folder), "array": name} | described | {"statistics": statistics}, indent=2))
        return
    axis, padded = spec.tensor.axis, spec.tensor.padded
    sharded = "no" if axis is None else f"along axis {axis}{f', padded to {padded} in memory' if padded else ''}"
    print(f"array       {name}\nstep        {folder}")
    print(f"shape       {shape_text(spec.shape)}, {spec.dtype}, {spec.nbytes:,} bytes")
    print(f"chunks      {_chunks_text(spec)}\nsharded     {sharded}")
    for label, value in statistics.items():
        print(f"{label:<11} {value:,}" if isinstance(value, int) else f"{label:<11} {value:.6g}")
    print(np.array2string(corner, threshold=0, edgeitems=EDGE, precision=5, max_line_width=120))


def _as_stored(values: Any, spec: ArraySpec) -> np.ndarray:
    """Values as Zarr returns them, in the array's dtype: Zarr holds bfloat16 as uint16."""
    return np.asarray(values).view(numpy_dtype(spec.dtype))


def _read_blocks(array: Any, spec: ArraySpec) -> Iterator[np.ndarray]:
    """All values of a Zarr array, flat, COUNTED_ELEMENTS at a time. Each chunk is read once."""
    chunk_rows, row_elements = spec.chunks[0], math.prod(spec.shape[1:])
    rows = chunk_rows * max(1, READ_ELEMENTS // (chunk_rows * row_elements))
    for first in range(0, spec.shape[0], rows):
        values = _as_stored(array[first : first + rows], spec).reshape(-1)
        for start in range(0, values.size, COUNTED_ELEMENTS):
            yield values[start : start + COUNTED_ELEMENTS]


def statistics_of(blocks: Iterable[np.ndarray]) -> dict[str, float | int]:
    """Mean, standard deviation and extremes of the finite values, in float64; counts of zeros and non-finite values."""
    count, mean, squares = 0, 0.0, 0.0  # of finite values; `squares` of their deviations from the mean
    least, most, zeros, non_finite = math.inf, -math.inf, 0, 0
    for block in blocks:
        values = block.astype(np.float64)
        finite = values[np.isfinite(values)]
        non_finite += values.size - finite.size
        if not finite.size:
            continue
        zeros += finite.size - int(np.count_nonzero(finite))
        least, most = min(least, float(finite.min())), max(most, float(finite.max()))
        # Chan et al.'s update: plain sums of squares would lose small deviations from a large mean.
        block_mean, total = float(finite.mean()), count + finite.size
        delta = block_mean - mean
        squares += float(np.square(finite - block_mean).sum()) + delta**2 * count * finite.size / total
        mean, count = mean + delta * finite.size / total, total
    counts: dict[str, float | int] = {"zeros": zeros, "non_finite": non_finite}
    return ({"mean": mean, "std": math.sqrt(squares / count), "min": least, "max": most} if count else {}) | counts


def _read_corner(array: Any, spec: ArraySpec) -> np.ndarray:
    """The values at both ends of each axis, float32, with one more value where numpy is to print "..."."""
    ends = [
        list(range(size)) if size <= 2 * EDGE else [*range(EDGE + 1), *range(size - EDGE, size)] for size in spec.shape
    ]
    return _as_stored(array.oindex[tuple(ends)], spec).astype(np.float32)


def verify_steps(paths: Sequence[Path], workers: int | None) -> int:
    """Read every chunk of the steps at `paths` with this many threads (default: one per core).

    Prints a line per step. Returns 1 if one is damaged, else 0.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    code = 0
    for folder in [folder for path in paths for folder in step_folders(path)]:
        begun = time.monotonic()
        try:
            size = _total_bytes(read_manifest(folder))
            with tqdm(total=size, desc=folder.name, unit="B", unit_scale=True, disable=None) as bar:
                verify(folder, progress=bar.update, workers=workers or cores())
        except CheckpointError as error:
            print(f"{folder}: damaged\n{error}", file=sys.stderr)
            code = 1
        else:
            seconds = time.monotonic() - begun
            print(f"{folder}: ok, {size:,} bytes in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)")
    return code

"""Small checkpoints: arrays of one to three dimensions, whose last chunks are cut off."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from griffin.trainer.checkpoint.arrays import ArraySpec, GlobalTensor, numpy_dtype
from griffin.trainer.checkpoint.manifest import Manifest, begin, commit
from griffin.trainer.checkpoint.zarr_io import FileRecord, create_array

ARRAYS = (
    ArraySpec(
        kind="model", tensor=GlobalTensor(name="up", shape=(5, 7), axis=1, atoms=7), dtype="bfloat16", chunks=(2, 4)
    ),
    ArraySpec(
        kind="optimizer.master",
        tensor=GlobalTensor(name="up", shape=(5, 7), axis=1, atoms=7),
        dtype="float32",
        chunks=(2, 4),
    ),
    ArraySpec(
        kind="optimizer.exp_avg", tensor=GlobalTensor(name="gate", shape=(3, 2, 5)), dtype="float32", chunks=(2, 2, 5)
    ),
    ArraySpec(
        kind="optimizer.exp_avg_sq",
        tensor=GlobalTensor(name="bias", shape=(9,), axis=0, atoms=3, padded=12),
        dtype="float16",
        chunks=(4,),
    ),
)


def random_bits(spec: ArraySpec, seed: int = 0) -> np.ndarray:
    """Values of any bits: NaNs with payloads, infinities, subnormal numbers and negative zeros among them."""
    dtype = numpy_dtype(spec.dtype)
    size = int(np.prod(spec.shape)) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(spec.shape)


def bits(values: np.ndarray) -> np.ndarray:
    """For comparisons in which NaNs are equal and zeros of other signs are not."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def write_array(folder: Path, spec: ArraySpec, values: np.ndarray) -> dict[str, FileRecord]:
    array = create_array(folder, spec)
    writes = {spec.file(index): array.write(index, values[spec.box(index)]) for index in spec.indices()}
    return {file: write.result() for file, write in writes.items()}


def make_manifest(step: int, arrays: Iterable[ArraySpec], files: dict[str, FileRecord], **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "step": step,
        "samples": 8 * step,
        "attempt": 1,
        "created": "2030-01-01T00:00:00+00:00",
        "config": {"model": {"width": 4096, "pattern": ["recurrent", "attention"]}, "optimizer": {"lr": 1e-05}},
        "layout": {"tensor": 2, "pipeline": 1},
        "optimizer": {"name": "adam", "step": step},
        "random": {"cpu": "AAAA"},
    }
    return Manifest(**fields | changes, arrays={array.name: array for array in arrays}, files=files)


def write_step(root: Path, step: int, arrays: Iterable[ArraySpec] = ARRAYS, **changes: Any) -> tuple[Path, Manifest]:
    """A step that is all written but not committed: its folder, and the manifest to commit."""
    tmp = begin(root, step)
    files: dict[str, FileRecord] = {}
    for spec in arrays:
        files |= write_array(tmp, spec, random_bits(spec))
    return tmp, make_manifest(step, arrays, files, **changes)


def save_step(root: Path, step: int, arrays: Iterable[ArraySpec] = ARRAYS, **changes: Any) -> Path:
    return commit(*write_step(root, step, arrays, **changes))

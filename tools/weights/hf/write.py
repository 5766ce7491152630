"""A checkpoint's weights as a folder that transformers loads."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from griffin.tools.checkpoints.auxiliary_files import CONFIG, copy_files
from griffin.tools.checkpoints.rewrite import best_weights
from griffin.tools.checkpoints.sources import SourceCheckpoint, StoredArray, open_step
from griffin.tools.checkpoints.write import OutputArray, new_folder, progress_bar, refuse_target, summarize
from griffin.tools.common import safetensors_files
from griffin.tools.common.safetensors_files import Entry
from griffin.tools.common.workers import Workers
from griffin.tools.weights.axis_map import AxisMap
from griffin.tools.weights.hf.config import ARCHITECTURE, MODEL_TYPE, ROPE, SAME
from griffin.tools.weights.hf.folder import INDEX, WEIGHTS
from griffin.tools.weights.hf.names import gate_heads, transformers_axes, transformers_name, transformers_settings
from griffin.tools.weights.tokenizer import AuxiliaryFiles, find_auxiliary_files
from griffin.trainer.checkpoint.arrays import CHUNK_BYTES, MODEL, ArraySpec, Box, numpy_dtype, shape_of, whole
from griffin.trainer.checkpoint.steps import resolve
from griffin.trainer.checkpoint.zarr_io import synchronise

# Keys of a config.json that mean what `transformers_settings` states by other names.
_OTHER_NAMES = (
    "_block_types",
    "_name_or_path",
    "layer_types",
    "rope_scaling",
    "rope_type",
    "sliding_window",
    "transformers_version",
)
_GATES = ("recurrent.input_gate.", "recurrent.recurrence_gate.")


def export_transformers(
    path: Path,
    target: Path,
    workers: Workers,
    *,
    shard_bytes: int,
    dtype: str | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write the model of a checkpoint to the new folder `target`, as transformers loads it.

    Args:
        path: a step's folder, or of steps, of which the newest complete one is taken.
        shard_bytes: size of the largest file, unless a tensor alone is larger.
        dtype: of the weights, which are then rounded from the master weights where there are any.
        tokenizer: folder of tokenizer files to take along instead of the checkpoint's own.

    Raises ValueError naming the setting where transformers has no such model, and CheckpointError naming the file for
    what is damaged or cannot be written; then nothing is left.
    """
    refuse_target(target)
    source = open_step(resolve(path))
    model = source.manifest.model
    settings = transformers_settings(model)
    auxiliary = find_auxiliary_files(source, tokenizer)
    files = lay_out_files(_exported(source, dtype), shard_bytes)
    dtypes = {tensor.output.spec.dtype for file in files for tensor in file.tensors}
    config = _config_json(settings, dtypes, auxiliary)
    begun = time.monotonic()
    size = sum(file.size for file in files)
    with new_folder(target) as tmp:
        for file in files:
            safetensors_files.create_file(tmp / file.name, file.header, file.size)
        with progress_bar(target.name, size) as bar:
            workers.run(_write, _tasks(tmp, files, durable=workers.remote), bar.update)
        for file in files:  # once, where workers are here: each of them would wait for what all have written
            synchronise(tmp / file.name)
        if len(files) > 1:
            names = {tensor.entry.name: file.name for file in files for tensor in file.tensors}
            total = sum(tensor.entry.nbytes for file in files for tensor in file.tensors)
            _write_json(tmp / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
        _write_json(tmp / CONFIG, config)
        for name, values in auxiliary.written.items():
            _write_json(tmp / name, values)
        copy_files(auxiliary.files, tmp)
        synchronise(tmp)
        tmp.rename(target)
        synchronise(tmp.parent)
    count = sum(len(file.tensors) for file in files)
    summarize(target, count, files=len(files), size=size, begun=begun)
    parameters = sum(int(np.prod(tensor.entry.shape)) for file in files for tensor in file.tensors)
    print(f"{parameters:,} parameters; {auxiliary.text}")


# What is written.


@dataclass(frozen=True)
class MergedGates:
    """Gates of a model with more diagonal blocks than heads: `merged` of them as one, zero outside of them."""

    source: StoredArray
    merged: int
    spec: ArraySpec

    def read(self, box: Box) -> np.ndarray:
        """As `StoredArray.read`: [heads, b, b] or [heads, b], for whole heads."""
        count, (heads, *rest) = self.merged, box
        assert shape_of(rest) == self.spec.shape[1:], (self.spec.name, box)
        held = self.source.spec.shape
        parts = self.source.read((slice(heads.start * count, heads.stop * count), *whole(held[1:])))
        parts = parts.reshape(-1, count, *held[1:])
        if len(rest) == 1:
            return parts.reshape(-1, count * held[1])
        merged = np.zeros((len(parts), count, held[1], count, held[2]), parts.dtype)
        for place in range(count):
            merged[:, place, :, place] = parts[:, place]
        return merged.reshape(shape_of(box))


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, what it is made of, and how that lies in it."""

    entry: Entry
    output: OutputArray
    axes: AxisMap


@dataclass(frozen=True)
class _File:
    name: str
    header: bytes
    tensors: tuple[_Tensor, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.entry.nbytes for tensor in self.tensors)


def _exported(source: SourceCheckpoint, dtype: str | None) -> list[_Tensor]:
    """Every tensor of the result, in the model's order, its place still open."""
    model = source.manifest.model
    merged = model.gate_blocks // gate_heads(model)
    best, tensors = best_weights(source), []
    for name, stored in source.arrays.items():
        spec = source.manifest.arrays[name]
        if spec.kind != MODEL:
            continue
        weights = stored if dtype in (None, spec.dtype) else best[name]
        spec = replace(spec, dtype=dtype or spec.dtype)
        if merged > 1 and any(gate in spec.tensor.name for gate in _GATES):
            blocks, *widths = spec.shape
            shape = (blocks // merged, *(merged * width for width in widths))
            spec = replace(spec, tensor=replace(spec.tensor, shape=shape), chunks=(1, *shape[1:]))
            weights = MergedGates(weights, merged, spec)
        axes = transformers_axes(spec.tensor.name, len(spec.shape))
        entry = Entry(transformers_name(spec.tensor.name), spec.dtype, axes.foreign_shape(spec.shape), 0)
        tensors.append(_Tensor(entry, OutputArray(spec, (weights,)), axes))
    return tensors


def lay_out_files(tensors: Sequence[_Tensor], shard_bytes: int) -> list[_File]:
    """Tensors in their order over files of at most `shard_bytes` of values, unless one alone is larger."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.entry.nbytes
    files = []
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.sort(key=lambda tensor: -numpy_dtype(tensor.entry.dtype).itemsize)  # so that all are aligned
        described = ((tensor.entry.name, tensor.entry.dtype, tensor.entry.shape) for tensor in shard)
        header, entries = safetensors_files.lay_out(described)
        placed = (replace(tensor, entry=entry) for tensor, entry in zip(shard, entries, strict=True))
        files.append(_File(name, header, tuple(placed)))
    return files


def _config_json(settings: dict[str, Any], dtypes: set[str], auxiliary: AuxiliaryFiles) -> dict[str, Any]:
    """config.json: what the checkpoint's own has besides, under what its model is now."""
    base = {key: value for key, value in auxiliary.config.items() if key not in _OTHER_NAMES}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    stated = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "dtype": dtype, "torch_dtype": dtype}
    # Older versions of transformers read these beside rope_parameters.
    stated |= SAME | {"rope_parameters": ROPE} | {key: ROPE[key] for key in ("rope_theta", "partial_rotary_factor")}
    return dict(sorted((base | stated | settings).items()))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as stream:
        stream.write(json.dumps(values, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


# By whom: each task is rows of one tensor, or some small tensors.


@dataclass(frozen=True)
class _Rows:
    """Rows [first, last) of a tensor of a file."""

    tensor: _Tensor
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * self.tensor.entry.row_bytes

    @property
    def offset(self) -> int:
        return self.tensor.entry.offset + self.first * self.tensor.entry.row_bytes

    def read(self) -> np.ndarray:
        """Their values, as they lie in the file."""
        box = (slice(self.first, self.last), *whole(self.tensor.entry.shape[1:]))
        return self.tensor.axes.foreign(self.tensor.output.read(self.tensor.axes.box(box)))


@dataclass(frozen=True)
class _Task:
    path: Path
    rows: tuple[_Rows, ...]
    durable: bool


def _tasks(folder: Path, files: Sequence[_File], *, durable: bool) -> Iterator[_Task]:
    """Of CHUNK_BYTES, unless a row of chunks of what is read is larger: it is read once only."""
    for file in files:
        batch: list[_Rows] = []
        size = 0
        for tensor in file.tensors:
            count, step = tensor.entry.shape[0], tensor.output.spec.chunks[tensor.axes.kept[0]]
            for first in range(0, count, step):
                rows = _Rows(tensor, first, min(first + step, count))
                if batch and size + rows.nbytes > CHUNK_BYTES:
                    yield _Task(folder / file.name, tuple(batch), durable)
                    batch, size = [], 0
                batch.append(rows)
                size += rows.nbytes
        yield _Task(folder / file.name, tuple(batch), durable)


def _write(task: _Task) -> int:
    values = [(rows.offset, rows.read()) for rows in task.rows]
    safetensors_files.write_values(task.path, values, durable=task.durable)
    for offset, array in values:
        safetensors_files.require_written(task.path, offset, array)
    return sum(rows.nbytes for rows in task.rows)

"""Export a checkpoint's weights as a folder that transformers loads."""

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

# Keys of a config.json that are other names for what `transformers_settings` states.
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
        path: a step's folder, or a folder of steps, of which the newest complete one is taken.
        shard_bytes: size of the largest file, unless a single tensor is larger.
        dtype: of the weights; they are rounded from the master weights if there are any. None: as stored.
        tokenizer: folder with tokenizer files to export instead of the checkpoint's own.

    Raises ValueError naming a setting that transformers cannot express, and CheckpointError naming a file that is
    damaged or cannot be written; nothing is left then.
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
        for file in files:  # once: a worker's sync would wait for what all local workers have written
            synchronise(tmp / file.name)
        if len(files) > 1:
            names = {tensor.entry.name: file.name for file in files for tensor in file.tensors}
            total = sum(tensor.entry.nbytes for file in files for tensor in file.tensors)
            _write_json(tmp / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
        _write_json(tmp / CONFIG, config)
        for name, values in auxiliary.json_files.items():
            _write_json(tmp / name, values)
        copy_files(auxiliary.files, tmp)
        synchronise(tmp)
        tmp.rename(target)
        synchronise(tmp.parent)
    count = sum(len(file.tensors) for file in files)
    summarize(target, count, files=len(files), size=size, begun=begun)
    parameters = sum(int(np.prod(tensor.entry.shape)) for file in files for tensor in file.tensors)
    print(f"{parameters:,} parameters; {auxiliary.summary}")


# The layout of the output


@dataclass(frozen=True)
class MergedGates:
    """Gate weights with `merged` adjacent diagonal blocks as one block, which is zero outside of them."""

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
class _OutputTensor:
    """A tensor of an output file, its values, and the map of their axes."""

    entry: Entry
    output: OutputArray
    axes: AxisMap


@dataclass(frozen=True)
class _OutputFile:
    name: str
    header: bytes
    tensors: tuple[_OutputTensor, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.entry.nbytes for tensor in self.tensors)


def _exported(source: SourceCheckpoint, dtype: str | None) -> list[_OutputTensor]:
    """Plan every output tensor in model order; offsets are not set yet."""
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
        tensors.append(_OutputTensor(entry, OutputArray(spec, (weights,)), axes))
    return tensors


def lay_out_files(tensors: Sequence[_OutputTensor], shard_bytes: int) -> list[_OutputFile]:
    """Distribute tensors in order over files of at most `shard_bytes` of values, unless a single one is larger."""
    shards: list[list[_OutputTensor]] = [[]]
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
        files.append(_OutputFile(name, header, tuple(placed)))
    return files


def _config_json(settings: dict[str, Any], dtypes: set[str], auxiliary: AuxiliaryFiles) -> dict[str, Any]:
    """Build config.json: the model's settings, over the other keys of the source's config.json."""
    base = {key: value for key, value in auxiliary.config.items() if key not in _OTHER_NAMES}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    stated = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "dtype": dtype, "torch_dtype": dtype}
    # Older versions of transformers read these keys instead of rope_parameters.
    stated |= SAME | {"rope_parameters": ROPE} | {key: ROPE[key] for key in ("rope_theta", "partial_rotary_factor")}
    return dict(sorted((base | stated | settings).items()))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as stream:
        stream.write(json.dumps(values, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


# Tasks of the workers: rows of one tensor, or several small tensors


@dataclass(frozen=True)
class _Rows:
    """Rows [first, last) of a tensor of a file."""

    tensor: _OutputTensor
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * self.tensor.entry.row_bytes

    @property
    def offset(self) -> int:
        return self.tensor.entry.offset + self.first * self.tensor.entry.row_bytes

    def read(self) -> np.ndarray:
        """Compute their values, in the file's order of axes."""
        box = (slice(self.first, self.last), *whole(self.tensor.entry.shape[1:]))
        return self.tensor.axes.to_foreign(self.tensor.output.read(self.tensor.axes.canonical_box(box)))


@dataclass(frozen=True)
class _Task:
    path: Path
    rows: tuple[_Rows, ...]
    durable: bool


def _tasks(folder: Path, files: Sequence[_OutputFile], *, durable: bool) -> Iterator[_Task]:
    """Split the files into tasks of CHUNK_BYTES, or of one row of source chunks if larger: each is read only once."""
    for file in files:
        batch: list[_Rows] = []
        size = 0
        for tensor in file.tensors:
            count, step = tensor.entry.shape[0], tensor.output.spec.chunks[tensor.axes.canonical_axes[0]]
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

"""Checkpoints as one safetensors file per (tensor, pipeline) rank, for engines that load a file per rank.

Each file holds its rank's shard of every array of its stages, under the array's name. All shards of an array have one
shape: the vocabulary's padding is stored as rows of zeros. `index.json` holds everything else of the checkpoint, so
any layout can be made from any other. Rows of a shard are written and read in slices, each with a checksum in the
index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from griffin.parallel.config import ParallelConfig
from griffin.parallel.cost import split_blocks
from griffin.tools.checkpoints.sources import SourceCheckpoint
from griffin.tools.common import safetensors_files
from griffin.tools.common.safetensors_files import Entry, read_box, read_bytes
from griffin.trainer.checkpoint.arrays import ArraySpec, Box, intersection, numpy_dtype, shape_of, within
from griffin.trainer.checkpoint.header import Header, header_to_json, parse_header
from griffin.trainer.checkpoint.manifest import Manifest, parse_arrays, read_checked, refusing
from griffin.trainer.checkpoint.manifest_check import model_of
from griffin.trainer.checkpoint.zarr_io import CheckpointError
from griffin.trainer.files import is_integer

INDEX = "index.json"
FORMAT = 1

_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")


@dataclass(frozen=True)
class ArrayShard:
    """One tensor rank's shard of an array, stored from byte `offset` of its file on."""

    spec: ArraySpec
    tensor_rank: int
    tensor_size: int
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, with the vocabulary's padding: the same on all ranks."""
        tensor = self.spec.tensor
        if tensor.axis is None:
            return tensor.shape
        held = tensor.axis_size // self.tensor_size
        return (*tensor.shape[: tensor.axis], held, *tensor.shape[tensor.axis + 1 :])

    @property
    def entry(self) -> Entry:
        return Entry(self.spec.name, self.spec.dtype, self.shape, self.offset)

    @property
    def row_bytes(self) -> int:
        return self.entry.row_bytes

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def slices(self) -> list[RowSlice]:
        """All rows, in slices of as many rows as the array's chunks have."""
        count, rows = self.shape[0], self.spec.chunks[0]
        return [RowSlice(self, first, min(first + rows, count)) for first in range(0, count, rows)]


@dataclass(frozen=True)
class RowSlice:
    """Rows [first, last) of a shard."""

    shard: ArrayShard
    first: int
    last: int

    @property
    def offset(self) -> int:
        return self.shard.offset + self.first * self.shard.row_bytes

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * self.shard.row_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.last - self.first, *self.shard.shape[1:])

    @property
    def box(self) -> Box:
        """The box of the global array that it holds: smaller than its shape where it overlaps padding, or empty."""
        held = self.shard.spec.tensor.part(self.shard.tensor_rank, self.shard.tensor_size)
        first = min(held[0].start + self.first, held[0].stop)
        return (slice(first, min(held[0].start + self.last, held[0].stop)), *held[1:])


@dataclass(frozen=True)
class RankFile:
    """The layout of a file: its header as bytes, and the shards that follow it."""

    name: str
    header: bytes
    shards: tuple[ArrayShard, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(shard.nbytes for shard in self.shards)

    def slices(self) -> Iterator[RowSlice]:
        for shard in self.shards:
            yield from shard.slices()


def stage_blocks(header: Header, layout: ParallelConfig) -> tuple[int, ...]:
    """Return the number of blocks of each of the pipeline x virtual stages, as training splits the model.

    Raises ValueError if there are fewer blocks than stages.
    """
    model, config = header.model, header.config
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        raise ValueError(f"--virtual {layout.virtual_pipeline}: must be 1 where --pipeline is 1")
    count = layout.pipeline * layout.virtual_pipeline
    if count > model.blocks:
        raise ValueError(
            f"--pipeline {layout.pipeline} x --virtual {layout.virtual_pipeline} = {count} stages: must be at most the "
            f"number of blocks, {model.blocks}"
        )
    stated = tuple(config["parallel"]["stages"])
    return stated if len(stated) == count else split_blocks(model, count, config["data"]["sequence_length"])


def lay_out(arrays: Sequence[ArraySpec], layout: ParallelConfig, stages: Sequence[int]) -> list[RankFile]:
    """Lay out the files for a layout with `stages` blocks per stage, ordered by pipeline rank, then tensor rank."""
    held: list[list[ArraySpec]] = [[] for _ in range(layout.pipeline)]
    for array in sorted(arrays, key=lambda array: -numpy_dtype(array.dtype).itemsize):  # so that all are aligned
        for pipeline_rank in _pipeline_ranks(array.tensor.name, layout.pipeline, stages):
            held[pipeline_rank].append(array)
    return [
        _lay_out_file(held[pipeline_rank], layout, tensor_rank, pipeline_rank)
        for pipeline_rank in range(layout.pipeline)
        for tensor_rank in range(layout.tensor)
    ]


def _pipeline_ranks(tensor: str, pipeline: int, stages: Sequence[int]) -> list[int]:
    """Return the pipeline ranks that hold a tensor; stage s is held by rank s mod `pipeline`."""
    last = len(stages) - 1
    if (block := _BLOCK.match(tensor)) is not None:
        ends = np.cumsum(stages)
        return [int(np.searchsorted(ends, int(block[1]), side="right")) % pipeline]
    if tensor == "embedding.weight":  # also the output projection
        return sorted({0, last % pipeline})
    if tensor.startswith("final_norm."):
        return [last % pipeline]
    raise CheckpointError(f"{tensor}: belongs to no known stage of the model")


def _lay_out_file(
    arrays: Sequence[ArraySpec], layout: ParallelConfig, tensor_rank: int, pipeline_rank: int
) -> RankFile:
    name = (
        f"model-tp-{tensor_rank:02d}-of-{layout.tensor:02d}-pp-{pipeline_rank:02d}-of-{layout.pipeline:02d}.safetensors"
    )
    shards = [ArrayShard(array, tensor_rank, layout.tensor, 0) for array in arrays]
    header, entries = safetensors_files.lay_out((shard.spec.name, shard.spec.dtype, shard.shape) for shard in shards)
    placed = (replace(shard, offset=entry.offset) for shard, entry in zip(shards, entries, strict=True))
    return RankFile(name, header, tuple(placed))


def checksum(values: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data):08x}"


@dataclass(frozen=True)
class RankArray:
    """An array stored in rank files; `shards` holds (file, shard) of each tensor rank."""

    spec: ArraySpec
    shards: tuple[tuple[Path, ArrayShard], ...]

    def read(self, box: Box) -> np.ndarray:
        """As `StoredArray.read`. Checksums of slices are not compared."""
        values = np.empty(shape_of(box), numpy_dtype(self.spec.dtype))
        is_cut = self.spec.tensor.axis is not None
        for path, shard in self.shards if is_cut else self.shards[:1]:
            held = self.spec.tensor.part(shard.tensor_rank, shard.tensor_size)
            common = intersection(held, box)
            if all(extent.start < extent.stop for extent in common):
                values[within(common, box)] = read_box(path, shard.entry, within(common, held))
        return values


def write_index(
    folder: Path,
    header: Header,
    arrays: Sequence[ArraySpec],
    stages: Sequence[int],
    files: Sequence[RankFile],
    checksums: Mapping[str, Mapping[str, Sequence[str]]],
) -> None:
    """Write index.json: the header, the arrays, and `checksums` of the slices, by file and array."""
    holders: dict[str, list[str]] = {array.name: [] for array in arrays}
    for file in files:
        for shard in file.shards:
            holders[shard.spec.name].append(file.name)
    values: dict[str, Any] = {"format": FORMAT, "stages": list(stages)} | header_to_json(header)
    values["arrays"] = {array.name: array.to_json() | {"files": holders[array.name]} for array in arrays}
    values["files"] = {file.name: {"size": file.size, "crc32": checksums[file.name]} for file in files}
    with open(folder / INDEX, "x", encoding="utf-8") as stream:
        stream.write(json.dumps({"checksum": index_checksum(values)} | values, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def index_checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def open_rank_folder(folder: Path) -> tuple[SourceCheckpoint, list[tuple[RankFile, Mapping[str, Sequence[str]]]]]:
    """Open a folder of rank files: returns the checkpoint, and its files with the checksums of their slices by array.

    Raises CheckpointError if the index is missing or was edited, or if a file is missing or differs from the index in
    size or header.
    """
    values = read_checked(folder / INDEX, index_checksum, FORMAT)
    with refusing(folder / INDEX):
        specs = parse_arrays(values)
        header = parse_header(values, besides=("arrays", "files", "stages"))
        layout = _layout(values, specs)
        files = lay_out(list(specs.values()), layout, values["stages"])
        _check_records(files, values.get("files"))
    records = values["files"]
    shards: dict[str, dict[int, tuple[Path, ArrayShard]]] = {name: {} for name in specs}
    for file in files:
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise CheckpointError(f"{path} is missing")
        if size != file.size:
            raise CheckpointError(f"{path} has {size:,} bytes instead of {file.size:,}")
        if read_bytes(path, 0, len(file.header)).tobytes() != file.header:
            raise CheckpointError(f"{path}: its header was changed")
        for shard in file.shards:
            shards[shard.spec.name].setdefault(shard.tensor_rank, (path, shard))
    arrays = {name: RankArray(spec, tuple(shards[name].values())) for name, spec in specs.items()}
    manifest = Manifest.of(header, specs.values(), {})
    return SourceCheckpoint(folder, manifest, arrays), [(file, records[file.name]["crc32"]) for file in files]


def _layout(values: Mapping[str, Any], specs: Mapping[str, ArraySpec]) -> ParallelConfig:
    """Return an index's layout, after checking `stages` too. Raises ValueError if its arrays cannot be sharded so."""
    stated, stages = values["layout"], values["stages"]
    keys = ("tensor", "pipeline", "virtual_pipeline")
    if missing := [key for key in keys if key not in stated]:
        raise ValueError(f"lacks layout.{missing[0]}")
    layout = ParallelConfig(**{key: stated[key] for key in keys})
    records = values.get("files")
    if not isinstance(records, Mapping) or layout.model_ranks != len(records):  # before laying out that many
        raise ValueError(f"files must be those of {layout.tensor} x {layout.pipeline} ranks")
    blocks = model_of(values["config"]).blocks
    if not (
        isinstance(stages, list)
        and len(stages) == layout.pipeline * layout.virtual_pipeline
        and all(is_integer(count, 1, blocks) for count in stages)
        and sum(stages) == blocks
    ):
        raise ValueError(f"stages must be the numbers of blocks of {layout.pipeline} x {layout.virtual_pipeline}")
    for spec in specs.values():
        if spec.tensor.axis is not None and spec.tensor.atoms % layout.tensor:
            raise ValueError(f"{spec.name} cannot be cut for {layout.tensor} tensor ranks")
        if (block := _BLOCK.match(spec.tensor.name)) is not None and int(block[1]) >= blocks:
            raise ValueError(f"{spec.name} belongs to none of the model's {blocks} blocks")
    return layout


def _check_records(files: Sequence[RankFile], records: Any) -> None:
    """Raise ValueError unless the records are those of the layout's files, arrays and slices."""
    if not isinstance(records, Mapping) or records.keys() != {file.name for file in files}:
        raise ValueError("files must be those of its layout")
    for file in files:
        record = records[file.name]
        checksums = record.get("crc32") if isinstance(record, Mapping) else None
        expected = {shard.spec.name: len(shard.slices()) for shard in file.shards}
        if not (
            isinstance(checksums, Mapping)
            and checksums.keys() == expected.keys()
            and all(isinstance(found, list) and len(found) == expected[name] for name, found in checksums.items())
        ):
            raise ValueError(f"files.{file.name} must have a checksum of each slice of its arrays")

"""Writing checkpoints that are made from others, and checking files per rank, by workers.

The work is cut into chunks of the result. Each is done by one worker: it reads what the chunk is made of, writes it,
and compares what the file then holds with what was meant.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from griffin.parallel.config import ParallelConfig
from griffin.tools.checkpoints import rank_files
from griffin.tools.checkpoints.auxiliary_files import SOURCE_FOLDER, copy_files
from griffin.tools.checkpoints.rank_files import RankFile, RowSlice
from griffin.tools.checkpoints.sources import StoredArray, open_cached, same_bits
from griffin.tools.common import safetensors_files
from griffin.tools.common.workers import Workers
from griffin.trainer.checkpoint.arrays import CHUNK_BYTES, ArraySpec, Box, numpy_dtype, shape_of
from griffin.trainer.checkpoint.manifest import Manifest, commit
from griffin.trainer.checkpoint.zarr_io import (
    SYNCS,
    Array,
    CheckpointError,
    FileRecord,
    create_array,
    naming,
    synchronise,
)

_OF_A_RUN = re.compile(r"step-\d{8,}(\..*)?")  # names that a run gives to its steps, and to what is left of them


@dataclass(frozen=True)
class OutputArray:
    """An array of the result, and the arrays that it is the mean of: mostly one, which it is a copy of."""

    spec: ArraySpec
    sources: tuple[StoredArray, ...]

    def read(self, box: Box) -> np.ndarray:
        """A box of the result, rounded to its dtype. Raises ValueError for a value that does not fit it."""
        first, *others = self.sources
        values = first.read(box)
        if others:
            total = values.astype(np.float64)
            for source in others:
                total += source.read(box)
            with np.errstate(over="ignore"):
                values = (total / len(self.sources)).astype(np.float32)
        return _rounded(values, self.spec)


def _rounded(values: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """`values` in a spec's dtype, to nearest, ties to even."""
    dtype = numpy_dtype(spec.dtype)
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    too_large = np.isinf(rounded) & np.isfinite(values)
    if too_large.any():
        raise ValueError(f"{spec.name}: {np.abs(values[too_large]).max():g} does not fit {spec.dtype}")
    return rounded


def refuse_target(target: Path) -> None:
    """Raise ValueError unless `target` can be made: it is not there, the folder that it is to be in is, and a run does
    not take it for its own."""
    tmp = _aside(target)
    with naming(tmp):  # its name may be too long
        is_being_written = tmp.exists()
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target}: exists, and is not overwritten")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target}: must be a new folder in one that is there; {target.absolute().parent} is not")
    name, parent = target.name, target.absolute().parent
    if _OF_A_RUN.fullmatch(name):
        for folder in (parent, parent.resolve()):
            if folder.name == "checkpoints" and (folder.parent / "config.toml").exists():
                raise ValueError(
                    f"{target}: must not be among the steps of a run ({folder.parent}), which resumes from its steps "
                    "and removes them; choose a name that is not step-NUMBER, or another folder"
                )
    if is_being_written:
        raise ValueError(f"{tmp}: exists; it is being written, or was left by what was killed: then remove it")


def _aside(target: Path) -> Path:
    return target.absolute().with_name(f"{target.name}.tmp")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which the caller gives its name in the end; on any failure it is removed."""
    tmp = _aside(target)
    try:
        tmp.mkdir()
    except OSError as error:
        raise CheckpointError(f"{tmp}: {error.strerror}") from None
    try:
        yield tmp
    except BaseException as error:
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, OSError):  # the disk is full, the folder is gone, ...
            raise CheckpointError(f"{error.filename or tmp}: {error.strerror}") from None
        raise


# A Zarr checkpoint.


@dataclass(frozen=True)
class _ChunkTask:
    made: OutputArray
    folder: Path
    index: tuple[int, ...]


def _write_chunk(task: _ChunkTask) -> tuple[str, FileRecord, int]:
    """The chunk's file, its record, and the bytes of the chunk."""
    spec = task.made.spec
    values = task.made.read(spec.box(task.index))
    array = open_cached(task.folder, spec)
    record = array.write(task.index, values).result()
    if not same_bits(array.read(spec.box(task.index)), values):
        raise CheckpointError(f"{task.folder / spec.file(task.index)} does not hold what was written to it")
    return spec.file(task.index), record, values.nbytes


def write_step(
    target: Path,
    manifest: Manifest,
    made: Sequence[OutputArray],
    workers: Workers,
    auxiliary: Mapping[str, Path] | None = None,
) -> None:
    """Write a Zarr checkpoint of these arrays, which are the manifest's, to the new folder `target`.

    Files of `auxiliary` are copied to its subfolder SOURCE_FOLDER, by the names that they get. Raises CheckpointError where a
    file cannot be read or written; then nothing is left.
    """
    begun = time.monotonic()
    files: dict[str, FileRecord] = {}
    with new_folder(target) as tmp:
        arrays = [create_array(tmp, one.spec) for one in made]
        tasks = (_ChunkTask(one, tmp, index) for one in made for index in one.spec.indices())
        with progress_bar(target.name, sum(one.spec.nbytes for one in made)) as bar:

            def done(result: tuple[str, FileRecord, int]) -> None:
                file, files[file], size = result
                bar.update(size)

            workers.run(_write_chunk, tasks, done)
        with ThreadPoolExecutor(SYNCS) as pool:
            list(pool.map(Array.synchronise, arrays))
        if auxiliary:
            (tmp / SOURCE_FOLDER).mkdir()
            copy_files(auxiliary, tmp / SOURCE_FOLDER)
        commit(tmp, replace(manifest, files=files))
    summarize(target, len(made), files=len(files), size=sum(one.spec.nbytes for one in made), begun=begun)


# Files per rank.


@dataclass(frozen=True)
class _SliceTask:
    """Slices of one file, CHUNK_BYTES together unless one alone is larger, with what they hold or held."""

    path: Path
    slices: tuple[RowSlice, ...]
    made: tuple[OutputArray, ...]  # to write
    checksums: tuple[str, ...]  # to check

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.slices)


def _batches(file: RankFile) -> Iterator[list[RowSlice]]:
    batch: list[RowSlice] = []
    size = 0
    for one in file.slices():
        if batch and size + one.nbytes > CHUNK_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += one.nbytes
    yield batch


@dataclass(frozen=True)
class _Written:
    """What became of a task's slices."""

    file: str
    checksums: tuple[tuple[str, int, str], ...]  # (array, first row, checksum) of each slice
    nbytes: int


def _write_slices(task: _SliceTask) -> _Written:
    values = []
    for one, made in zip(task.slices, task.made, strict=True):
        array = np.zeros(one.shape, numpy_dtype(made.spec.dtype))
        if 0 not in shape_of(one.box):  # else padding only
            array[tuple(slice(size) for size in shape_of(one.box))] = made.read(one.box)
        values.append((one, array))
    safetensors_files.write_values(task.path, [(one.offset, array) for one, array in values])
    for one, array in values:
        safetensors_files.require_written(task.path, one.offset, array)
    checksums = tuple((one.shard.spec.name, one.first, rank_files.checksum(array)) for one, array in values)
    return _Written(task.path.name, checksums, task.nbytes)


def _check_slices(task: _SliceTask) -> int:
    for one, expected in zip(task.slices, task.checksums, strict=True):
        if rank_files.checksum(safetensors_files.read_bytes(task.path, one.offset, one.nbytes)) != expected:
            raise CheckpointError(
                f"{task.path} is damaged: {one.shard.spec.name} does not match its checksum in {rank_files.INDEX}"
            )
    return task.nbytes


def check_files(folder: Path, files: Sequence[tuple[RankFile, Mapping[str, Sequence[str]]]], workers: Workers) -> None:
    """Compare all of a folder of rank files with the index. Raises CheckpointError naming the file."""

    def tasks() -> Iterator[_SliceTask]:
        for file, checksums in files:
            expected = iter([value for shard in file.shards for value in checksums[shard.spec.name]])
            for batch in _batches(file):
                yield _SliceTask(folder / file.name, tuple(batch), (), tuple(next(expected) for _ in batch))

    with progress_bar(f"checking {folder.name}", sum(file.size for file, _ in files)) as bar:
        workers.run(_check_slices, tasks(), bar.update)


def write_ranks(
    target: Path, manifest: Manifest, made: Sequence[OutputArray], layout: ParallelConfig, workers: Workers
) -> None:
    """Write these arrays, which are the manifest's, as a file per rank to the new folder `target`.

    Raises CheckpointError where a file cannot be read or written; then nothing is left.
    """
    begun = time.monotonic()
    stages = rank_files.stage_blocks(manifest, layout)
    files = rank_files.lay_out(list(manifest.arrays.values()), layout, stages)
    by_name = {one.spec.name: one for one in made}
    checksums: dict[str, dict[str, dict[int, str]]] = {
        file.name: {shard.spec.name: {} for shard in file.shards} for file in files
    }
    with new_folder(target) as tmp:
        for file in files:
            safetensors_files.create_file(tmp / file.name, file.header, file.size)
        tasks = (
            _SliceTask(tmp / file.name, tuple(batch), tuple(by_name[one.shard.spec.name] for one in batch), ())
            for file in files
            for batch in _batches(file)
        )
        with progress_bar(target.name, sum(file.size for file in files)) as bar:

            def done(written: _Written) -> None:
                for array, first, checksum in written.checksums:
                    checksums[written.file][array][first] = checksum
                bar.update(written.nbytes)

            workers.run(_write_slices, tasks, done)
        in_order = {
            file: {name: [values[first] for first in sorted(values)] for name, values in arrays.items()}
            for file, arrays in checksums.items()
        }
        rank_files.write_index(tmp, manifest, stages, files, in_order)
        synchronise(tmp)
        tmp.rename(target)
        synchronise(tmp.parent)
    summarize(target, len(made), files=len(files), size=sum(file.size for file in files), begun=begun)


def progress_bar(name: str, size: int) -> tqdm:
    """A progress bar of bytes, on a terminal only."""
    return tqdm(total=size, desc=name, unit="B", unit_scale=True, disable=None)


def summarize(target: Path, arrays: int, *, files: int, size: int, begun: float) -> None:
    seconds = time.monotonic() - begun
    print(
        f"{target}: {arrays:,} arrays, {files:,} files, {size:,} bytes in {seconds:.1f} s "
        f"({size / 1e6 / seconds:,.0f} MB/s), compared with the source"
    )

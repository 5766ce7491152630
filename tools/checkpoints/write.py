"""Write checkpoints made from other checkpoints, and verify rank files, with worker processes.

The work is split into chunks of the output. One worker does each: it reads the source, writes the chunk, reads it back
and compares.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
from griffin.trainer.checkpoint.header import Header
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

_STEP_NAME = re.compile(r"step-\d{8,}(\..*)?")  # names that a run gives to its steps and to their leftovers


@dataclass(frozen=True)
class OutputArray:
    """An array to write: the copy of one source array, or the mean of several."""

    spec: ArraySpec
    sources: tuple[StoredArray, ...]

    def read(self, box: Box) -> np.ndarray:
        """Compute a box, rounded to the output dtype. Raises ValueError for a value that overflows it."""
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
    """Round `values` to a spec's dtype: to nearest, ties to even."""
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
    """Raise ValueError unless `target` can be created: it is new, its parent exists, and no run would take it for one
    of its own steps."""
    tmp = _tmp_path(target)
    with naming(tmp):  # the name may be too long
        is_being_written = tmp.exists()
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target}: exists, and is not overwritten")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target}: must be in a folder that exists; {target.absolute().parent} does not")
    name, parent = target.name, target.absolute().parent
    if _STEP_NAME.fullmatch(name):
        for folder in (parent, parent.resolve()):
            if folder.name == "checkpoints" and (folder.parent / "config.toml").exists():
                raise ValueError(
                    f"{target}: must not be among the steps of a run ({folder.parent}), which resumes from them and "
                    "removes old ones; choose a name other than step-NUMBER, or another folder"
                )
    if is_being_written:
        raise ValueError(f"{tmp}: exists; it is being written, or was left by a killed command: then remove it")


def _tmp_path(target: Path) -> Path:
    return target.absolute().with_name(f"{target.name}.tmp")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Create a temporary folder beside `target`, which the caller renames at the end; removed on any failure."""
    tmp = _tmp_path(target)
    try:
        tmp.mkdir()
    except OSError as error:
        raise CheckpointError(f"{tmp}: {error.strerror}") from None
    try:
        yield tmp
    except BaseException as error:
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, OSError):  # such as a full disk
            raise CheckpointError(f"{error.filename or tmp}: {error.strerror}") from None
        raise


# Zarr checkpoints


@dataclass(frozen=True)
class _ChunkTask:
    output: OutputArray
    folder: Path
    index: tuple[int, ...]


def _write_chunk(task: _ChunkTask) -> tuple[str, FileRecord, int]:
    """Write one chunk and return its file, its record and its size in bytes."""
    spec = task.output.spec
    values = task.output.read(spec.box(task.index))
    array = open_cached(task.folder, spec)
    record = array.write(task.index, values).result()
    if not same_bits(array.read(spec.box(task.index)), values):
        raise CheckpointError(f"{task.folder / spec.file(task.index)} does not hold what was written to it")
    return spec.file(task.index), record, values.nbytes


def write_step(
    target: Path,
    header: Header,
    outputs: Sequence[OutputArray],
    workers: Workers,
    auxiliary: Mapping[str, Path] | None = None,
) -> None:
    """Write a Zarr checkpoint of this header and these arrays to the new folder `target`.

    `auxiliary` maps names to files, which are copied to the subfolder SOURCE_FOLDER. Raises CheckpointError if a file
    cannot be read or written; nothing is left then.
    """
    begun = time.monotonic()
    files: dict[str, FileRecord] = {}
    with new_folder(target) as tmp:
        arrays = [create_array(tmp, one.spec) for one in outputs]
        tasks = (_ChunkTask(one, tmp, index) for one in outputs for index in one.spec.indices())
        with progress_bar(target.name, sum(one.spec.nbytes for one in outputs)) as bar:

            def done(result: tuple[str, FileRecord, int]) -> None:
                file, files[file], size = result
                bar.update(size)

            workers.run(_write_chunk, tasks, done)
        with ThreadPoolExecutor(SYNCS) as pool:
            list(pool.map(Array.synchronise, arrays))
        if auxiliary:
            (tmp / SOURCE_FOLDER).mkdir()
            copy_files(auxiliary, tmp / SOURCE_FOLDER)
        commit(tmp, Manifest.of(header, (one.spec for one in outputs), files))
    summarize(target, len(outputs), files=len(files), size=sum(one.spec.nbytes for one in outputs), begun=begun)


# Rank files


@dataclass(frozen=True)
class _SliceTask:
    """Slices of one file, at most CHUNK_BYTES unless a single slice is larger, with their values or checksums."""

    path: Path
    slices: tuple[RowSlice, ...]
    outputs: tuple[OutputArray, ...]  # to write
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
class _WrittenSlices:
    """The result of writing a task's slices."""

    file: str
    checksums: tuple[tuple[str, int, str], ...]  # (array, first row, checksum) of each slice
    nbytes: int


def _write_slices(task: _SliceTask) -> _WrittenSlices:
    values = []
    for one, output in zip(task.slices, task.outputs, strict=True):
        array = np.zeros(one.shape, numpy_dtype(output.spec.dtype))
        if 0 not in shape_of(one.box):  # otherwise it holds only padding
            array[tuple(slice(size) for size in shape_of(one.box))] = output.read(one.box)
        values.append((one, array))
    safetensors_files.write_values(task.path, [(one.offset, array) for one, array in values])
    for one, array in values:
        safetensors_files.require_written(task.path, one.offset, array)
    checksums = tuple((one.shard.spec.name, one.first, rank_files.checksum(array)) for one, array in values)
    return _WrittenSlices(task.path.name, checksums, task.nbytes)


def _check_slices(task: _SliceTask) -> int:
    for one, expected in zip(task.slices, task.checksums, strict=True):
        if rank_files.checksum(safetensors_files.read_bytes(task.path, one.offset, one.nbytes)) != expected:
            raise CheckpointError(
                f"{task.path} is damaged: {one.shard.spec.name} does not match its checksum in {rank_files.INDEX}"
            )
    return task.nbytes


def check_files(folder: Path, files: Sequence[tuple[RankFile, Mapping[str, Sequence[str]]]], workers: Workers) -> None:
    """Compare every slice of a folder of rank files with the index. Raises CheckpointError naming a damaged file."""

    def tasks() -> Iterator[_SliceTask]:
        for file, checksums in files:
            expected = iter([value for shard in file.shards for value in checksums[shard.spec.name]])
            for batch in _batches(file):
                yield _SliceTask(folder / file.name, tuple(batch), (), tuple(next(expected) for _ in batch))

    with progress_bar(f"checking {folder.name}", sum(file.size for file, _ in files)) as bar:
        workers.run(_check_slices, tasks(), bar.update)


def write_ranks(
    target: Path, header: Header, outputs: Sequence[OutputArray], layout: ParallelConfig, workers: Workers
) -> None:
    """Write this header and these arrays as one file per rank to the new folder `target`.

    Raises CheckpointError if a file cannot be read or written; nothing is left then.
    """
    begun = time.monotonic()
    stages, arrays = rank_files.stage_blocks(header, layout), [one.spec for one in outputs]
    files = rank_files.lay_out(arrays, layout, stages)
    by_name = {one.spec.name: one for one in outputs}
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

            def done(written: _WrittenSlices) -> None:
                for array, first, checksum in written.checksums:
                    checksums[written.file][array][first] = checksum
                bar.update(written.nbytes)

            workers.run(_write_slices, tasks, done)
        in_order = {
            file: {name: [values[first] for first in sorted(values)] for name, values in by_array.items()}
            for file, by_array in checksums.items()
        }
        rank_files.write_index(tmp, header, arrays, stages, files, in_order)
        synchronise(tmp)
        tmp.rename(target)
        synchronise(tmp.parent)
    summarize(target, len(outputs), files=len(files), size=sum(file.size for file in files), begun=begun)


def progress_bar(name: str, size: int) -> tqdm:
    """Return a progress bar of bytes, shown on a terminal only."""
    return tqdm(total=size, desc=name, unit="B", unit_scale=True, disable=None)


def summarize(target: Path, arrays: int, *, files: int, size: int, begun: float) -> None:
    """Print what was written to `target` and how fast; `begun` is the start in time.monotonic()."""
    seconds = time.monotonic() - begun
    print(
        f"{target}: {arrays:,} arrays, {files:,} files, {size:,} bytes in {seconds:.1f} s "
        f"({size / 1e6 / seconds:,.0f} MB/s), compared with the source"
    )

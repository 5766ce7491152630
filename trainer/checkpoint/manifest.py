"""A step of a checkpoints folder: written under a temporary name, committed with a manifest, and checked.

A step is a folder `step-00000100`: a Zarr v3 group with a `manifest.json` that holds all other state of the training
and the size and checksum of every file. A folder gets its step's name only once it is complete.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from griffin.trainer.checkpoint.arrays import ArraySpec
from griffin.trainer.checkpoint.header import Header, header_fields, header_to_json, parse_header
from griffin.trainer.checkpoint.manifest_check import array_spec, check_files
from griffin.trainer.checkpoint.zarr_io import (
    Array,
    CheckpointError,
    FileRecord,
    naming,
    open_array,
    synchronise,
)
from griffin.trainer.files import parse_json, read_regular
from griffin.trainer.run.step_name import step_name

FORMAT = 1
MANIFEST = "manifest.json"
GROUP = "zarr.json"
_SHOWN = 10  # damaged files that a message lists


@dataclass(frozen=True, kw_only=True)
class Manifest(Header):
    """A step's header, its arrays, and the record of each of its files."""

    arrays: dict[str, ArraySpec]  # by name
    files: dict[str, FileRecord]  # by path in the step's folder

    @classmethod
    def of(cls, header: Header, arrays: Iterable[ArraySpec], files: Mapping[str, FileRecord]) -> Manifest:
        """A manifest with this header (or that of another manifest), and these arrays and files."""
        return cls(**header_fields(header), arrays={array.name: array for array in arrays}, files=dict(files))

    def chunk_files(self) -> Iterator[str]:
        """The path of every chunk of every array."""
        return itertools.chain.from_iterable(map(array.file, array.indices()) for array in self.arrays.values())

    def metadata_files(self) -> list[str]:
        """The paths of the group's metadata and of every array's."""
        return [GROUP, *(array.metadata_file for array in self.arrays.values())]


def _write(path: Path, text: str) -> None:
    with naming(path), open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> Any:
    with naming(path):
        return json.loads(path.read_bytes())


def _record(path: Path) -> FileRecord:
    """The record of a small file, by reading all of it."""
    with naming(path):
        content = read_regular(path)
    return FileRecord(len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f"\nand {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError("\n".join(problems[:_SHOWN]) + more)


# Writing a step.


def begin(root: Path, step: int, owner: str = "") -> Path:
    """Create the folder to write a step in, `root/step-00000100.OWNER.tmp`, in place of a leftover of that name.

    Args:
        root: the checkpoints folder; created if missing, but not its parents.
        owner: hexadecimal digits of the run that writes. A run that has lost its run folder to another, and does not
            know it yet, so writes to a folder of its own. With "", the folder is `root/step-00000100.tmp`.
    """
    folder = root / ".".join(part for part in (step_name(step), owner, "tmp") if part)
    with naming(folder):
        if not root.exists():
            root.mkdir(exist_ok=True)
            synchronise(root.parent)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    return folder


def commit(tmp: Path, manifest: Manifest, final: Path | None = None) -> Path:
    """Write the metadata and the manifest of a step, and rename its folder to the step's name.

    A folder that already has the name (a damaged one that was skipped) is kept as `step-....damaged-1`.

    Args:
        tmp: the folder in which every array was created and every chunk written, all synchronised to disk.
        manifest: `files` holds a record of every chunk; those of the zarr.json files are added here.
        final: the step's folder, beside `tmp`; by default `tmp` without its suffix.

    Returns:
        The step's folder.

    Raises:
        CheckpointError: a file is missing or has another size than recorded, or the step cannot be written.
    """
    expected = list(manifest.chunk_files())
    assert len(expected) == len(set(expected)), "two chunks with one file"
    assert manifest.files.keys() == set(expected), sorted(manifest.files.keys() ^ set(expected))[:_SHOWN]
    # Consolidated metadata as zarr-python writes it: opening the group reads one file, not thousands.
    for array in manifest.arrays.values():
        open_array(tmp, array)
    consolidated = {array.name: _read_json(tmp / array.metadata_file) for array in manifest.arrays.values()}
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"step": manifest.step, "format": FORMAT},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": consolidated},
    }
    _write(tmp / GROUP, json.dumps(group))
    metadata = {name: _record(tmp / name) for name in manifest.metadata_files()}
    manifest = replace(manifest, files=metadata | manifest.files)
    _refuse(_mismatches(tmp, manifest))
    _write(tmp / MANIFEST, to_text(manifest))

    final = final or tmp.with_name(tmp.name.removesuffix(".tmp"))
    with naming(final):
        synchronise(tmp)
        if final.exists():
            set_aside(final, "damaged")
        tmp.rename(final)
        synchronise(final.parent)
    return final


def set_aside(folder: Path, why: str) -> Path:
    """Rename a step to `step-....WHY-N` for the first free N, so that it is no longer a step. Returns its path."""
    names = (folder.with_name(f"{folder.name}.{why}-{count}") for count in itertools.count(1))
    kept = next(path for path in names if not path.exists())
    with naming(folder):
        folder.rename(kept)
        synchronise(folder.parent)
    return kept


def _checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of the values in their order, whatever the white space in the file."""
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()


def to_text(manifest: Manifest) -> str:
    """The manifest as JSON, with each array and each file on a line of its own."""
    values: dict[str, Any] = {"format": FORMAT}
    values |= header_to_json(manifest)
    values["arrays"] = {name: array.to_json() for name, array in manifest.arrays.items()}
    values["files"] = {name: vars(record) for name, record in sorted(manifest.files.items())}
    entries = []
    for key, value in ({"checksum": _checksum(values)} | values).items():
        if key in ("arrays", "files"):
            lines = (f"    {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items())
            entries.append(f'  "{key}": {{\n' + ",\n".join(lines) + "\n  }")
        else:
            entries.append(f'  "{key}": ' + json.dumps(value, indent=2).replace("\n", "\n  "))
    return "{\n" + ",\n".join(entries) + "\n}\n"


# Reading a step.


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a step's folder, but not the files that it lists.

    Raises:
        CheckpointError: it is missing, cannot be read, was edited or has another format.
    """
    path = folder / MANIFEST
    values = read_checked(path, _checksum, FORMAT)
    with refusing(path):
        arrays = parse_arrays(values)
        check_files(arrays, values.get("files"), GROUP)
        header = parse_header(values, besides=("arrays", "files"))
    files = {name: FileRecord(**record) for name, record in values["files"].items()}
    return Manifest.of(header, arrays.values(), files)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn a ValueError about the content of a file into a CheckpointError that names the file."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged, or of another version: {error}") from None


def read_checked(path: Path, checksum_of: Callable[[Mapping[str, Any]], str], version: int) -> dict[str, Any]:
    """The JSON object in a file, without its checksum and format. CheckpointError if either does not match."""
    with naming(path):
        text = read_regular(path)
    try:
        values = parse_json(text)
        damaged = values.pop("checksum") != checksum_of(values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        damaged = True
    if damaged:
        raise CheckpointError(f"{path} is damaged or was edited: its content does not match its checksum")
    found = values.pop("format", None)
    if found != version:
        raise CheckpointError(f"{path} is of format {found!r}; this version reads format {version}")
    return values


def parse_arrays(values: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """Check and build the arrays of a manifest. ValueError naming what is not accepted."""
    arrays = values.get("arrays")
    if not isinstance(arrays, Mapping):
        raise ValueError("must have arrays by their names")
    return {name: array_spec(name, array) for name, array in arrays.items()}


def _mismatches(folder: Path, manifest: Manifest) -> list[str]:
    """Messages about files of a step that are missing or have another size. Ignores files without a record."""
    expected: dict[str, dict[str, int]] = {}
    for path, record in manifest.files.items():
        where, _, name = path.rpartition("/")
        expected.setdefault(where, {})[name] = record.size
    problems = []
    for where, sizes in expected.items():
        with naming(folder / where):
            try:
                with os.scandir(folder / where) as entries:
                    found = {entry.name: entry.stat().st_size for entry in entries if entry.name in sizes}
            except (FileNotFoundError, NotADirectoryError):
                found = {}
        for name, size in sizes.items():
            if name not in found:
                problems.append(f"{folder / where / name} is missing")
            elif found[name] != size:
                problems.append(f"{folder / where / name} has {found[name]:,} bytes instead of {size:,}")
    return problems


def check(folder: Path) -> Manifest:
    """Check that a step is complete: its manifest, and the presence and size of every file. Reads no arrays.

    Raises:
        CheckpointError: it is not complete; the message names the first files that are missing or have another size.
    """
    manifest = read_manifest(folder)
    problems = _mismatches(folder, manifest)
    if not problems and _record(folder / GROUP) != manifest.files[GROUP]:
        problems.append(f"{folder / GROUP} was changed")
    _refuse(problems)
    return manifest


def verify(folder: Path, progress: Callable[[int], object] | None = None, workers: int = 4) -> Manifest:
    """Check a whole step: as `check`, and the content of every file against its checksum and the manifest.

    Args:
        progress: called with the number of bytes just read; the numbers add up to the size of all files.
        workers: number of threads, each with one chunk in memory.

    Raises:
        CheckpointError: the message names the damaged files.
    """
    manifest = check(folder)
    report = progress or (lambda size: None)
    problems = []
    report(manifest.files[GROUP].size)

    def open_checked(spec: ArraySpec) -> Array:
        file = spec.metadata_file
        if _record(folder / file) != manifest.files[file]:
            raise CheckpointError(f"{folder / file} was changed")
        array = open_array(folder, spec)
        report(manifest.files[file].size)
        return array

    def read(array: Array, index: tuple[int, ...]) -> int:
        record = manifest.files[array.spec.file(index)]
        array.read_chunk(index, record)
        return record.size

    def finish(futures: Iterable[Future[int]]) -> None:
        for future in futures:
            try:
                report(future.result())
            except CheckpointError as error:
                problems.append(str(error))

    with ThreadPoolExecutor(workers) as pool:
        running: set[Future[int]] = set()
        for spec in manifest.arrays.values():
            try:
                array = open_checked(spec)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for index in spec.indices():
                if len(running) == 2 * workers:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    finish(finished)
                running.add(pool.submit(read, array, index))
        finish(running)
    _refuse(problems)
    return manifest

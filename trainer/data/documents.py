"""Finding, reading and encoding documents, in the worker processes of a build.

This module imports neither torch nor megatron-core, so that workers start quickly. Work is split into tasks of about
`TASK_BYTES`, so that memory is bounded by a few tasks. A text file is one document, and must fit in memory.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import zstandard

from griffin.trainer.data.tokenizer import load_tokenizer

TASK_BYTES = 2**20
ZSTD_READ_BYTES = 2**14  # compressed bytes per call, which bounds the decompressed size
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
UNSUPPORTED = {".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Feather"}
DEFAULT_GLOBS = ("*.txt", "*.md", "*.rst", "*.py", *(f"*{suffix}" for suffix in JSON_LINES))


@dataclass(frozen=True)
class Source:
    """An input file. `key` is its path relative to the input folder, or its name if it is an input itself."""

    path: Path
    key: str
    named: bool  # whether it is an input itself

    @property
    def json_lines(self) -> bool:
        return self.path.name.endswith(JSON_LINES)


@dataclass(frozen=True)
class EncodeOptions:
    """Options of encoding a task."""

    tokenizer: str
    eod: str | None
    text_key: str
    hold_out: float  # fraction of held-out documents


@dataclass(frozen=True)
class Encoded:
    """The encoded documents of one task, in order. Each ends with the end-of-document token."""

    tokens: np.ndarray  # int32 [tokens]
    lengths: np.ndarray  # int64 [documents]
    text_bytes: np.ndarray  # int64 [documents], in UTF-8
    held_out: np.ndarray  # bool [documents]
    empty: int  # documents without a token, skipped
    undecodable: int  # files of an input folder that are not UTF-8, skipped
    progress: int  # bytes of input read


@dataclass(frozen=True)
class Files:
    """A task: text files, one document each."""

    sources: tuple[Source, ...]
    progress: int

    def texts(self, text_key: str) -> Iterator[tuple[str, str | None]]:
        """(key, text) of each document. The text of a file of an input folder that is not UTF-8 is None."""
        for source in self.sources:
            try:
                yield source.key, source.path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                if source.named:
                    raise ValueError(f"{source.path}: not UTF-8 text ({error})") from error
                yield source.key, None
            except OSError as error:
                raise ValueError(f"{source.path}: cannot be read ({error})") from error


@dataclass(frozen=True)
class Lines:
    """A task: consecutive lines of a JSON Lines file, one document each."""

    source: Source
    first: int  # number of the first line, from 1
    lines: tuple[bytes, ...]
    progress: int

    def texts(self, text_key: str) -> Iterator[tuple[str, str | None]]:
        """(key, text) of each document. Blank lines are skipped."""
        for number, line in enumerate(self.lines, start=self.first):
            if line.strip():
                yield f"{self.source.key}:{number}", _text_of(line, text_key, f"{self.source.path}, line {number}")


def find_sources(inputs: Sequence[str], globs: Sequence[str], exclude: Sequence[str]) -> list[Source]:
    """All input files in a fixed order: inputs as given, the files of a folder by relative path.

    Folders are walked recursively; hidden files, hidden folders and links to folders are skipped. `globs` select files
    by name, or by relative path if they contain a slash; `exclude` removes files and whole folders by the same rule.
    Raises ValueError for an input that does not exist or has an unsupported format.
    """
    sources = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            keys = sorted(_walk(path, exclude))
            found = [Source(path / key, key, named=False) for key in keys if _matches(key, globs)]
            for source in found or [Source(path / key, key, named=False) for key in keys]:
                _refuse_unsupported(source.path, is_selected=bool(found))
            sources += found
        elif path.is_file():
            _refuse_unsupported(path)
            sources.append(Source(path, path.name, named=True))
        else:
            raise ValueError(f"input {name!r}: no such file or folder")
    return sources


def cut_into_tasks(sources: Sequence[Source]) -> Iterator[Files | Lines]:
    """Split the sources into tasks, in order."""
    files: list[Source] = []
    size = 0
    for source in sources:
        if not source.json_lines:
            files.append(source)
            size += source.path.stat().st_size
        if files and (source.json_lines or size >= TASK_BYTES):
            yield Files(tuple(files), size)
            files, size = [], 0
        if source.json_lines:
            yield from _cut_lines(source)
    if files:
        yield Files(tuple(files), size)


def encode(task: Files | Lines, options: EncodeOptions) -> Encoded:
    """Encode the documents of a task. Raises ValueError naming the file, and the line if it has lines."""
    tokenizer = _tokenizer(options.tokenizer, options.eod)
    end = np.array([tokenizer.eod], dtype=np.int32)
    parts: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    lengths: list[int] = []
    text_bytes: list[int] = []
    held_out: list[bool] = []
    empty = undecodable = 0
    for key, text in task.texts(options.text_key):
        if text is None:
            undecodable += 1
            continue
        ids = tokenizer.encode(text)
        if not ids.size:
            empty += 1
            continue
        parts += (ids, end)
        lengths.append(ids.size + 1)
        text_bytes.append(len(text.encode()))
        held_out.append(is_held_out(key, options.hold_out))
    return Encoded(
        tokens=np.concatenate(parts),
        lengths=np.array(lengths, dtype=np.int64),
        text_bytes=np.array(text_bytes, dtype=np.int64),
        held_out=np.array(held_out, dtype=bool),
        empty=empty,
        undecodable=undecodable,
        progress=task.progress,
    )


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the document with this key is held out. It depends on a hash of the key only."""
    digest = hashlib.blake2b(os.fsencode(key), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)  # once per process, not per task


def _walk(folder: Path, exclude: Sequence[str]) -> Iterator[str]:
    """Paths of the files in `folder`, relative to it, with forward slashes."""

    def unreadable(error: OSError) -> None:
        raise ValueError(f"input {folder}: cannot be read ({error})") from error

    for root, folders, files in os.walk(folder, onerror=unreadable):
        inside = PurePosixPath(Path(root).relative_to(folder).as_posix())

        def kept(name: str, inside: PurePosixPath = inside) -> bool:
            return not name.startswith(".") and not _matches(str(inside / name), exclude)

        folders[:] = filter(kept, folders)
        yield from (str(inside / name) for name in filter(kept, files) if Path(root, name).is_file())


def _refuse_unsupported(path: Path, *, is_selected: bool = True) -> None:
    """Raise ValueError for Parquet and the like, and for a .json file with an array: a data set, not a document."""
    suffix = path.suffix.lower()
    if suffix in UNSUPPORTED:
        raise ValueError(
            f"{path}: {UNSUPPORTED[suffix]} is not supported; write its rows as JSON Lines, for instance with "
            f"pandas: DataFrame.to_json('data.jsonl', orient='records', lines=True)"
        )
    if suffix == ".json" and is_selected:
        try:
            with path.open("rb") as file:
                is_array = _first_byte(file) == b"["
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error
        if is_array:
            raise ValueError(
                f"{path}: a JSON array is a data set, not one document; write its elements as lines, for instance with "
                f"jq -c '.[]' {path} > {path}l, or skip it with --exclude"
            )


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte of a text after white space and byte-order marks."""
    while block := file.read(2**16):
        if rest := block.removeprefix(b"\xef\xbb\xbf").lstrip():
            return rest[:1]
    return b""


def _matches(key: str, patterns: Sequence[str]) -> bool:
    name = PurePosixPath(key).name
    return any(fnmatch(key if "/" in pattern else name, pattern) for pattern in patterns)


def _cut_lines(source: Source) -> Iterator[Lines]:
    with source.path.open("rb") as raw, _decompressed(source.path, raw) as stream:
        number, read = 1, 0
        while lines := stream.readlines(TASK_BYTES):
            yield Lines(source, number, tuple(lines), raw.tell() - read)
            number, read = number + len(lines), raw.tell()


@contextmanager
def _decompressed(path: Path, raw: BinaryIO) -> Iterator[io.BufferedIOBase]:
    try:
        if path.suffix == ".gz":
            with gzip.open(raw) as stream:
                yield stream  # type: ignore[misc]
        elif path.suffix == ".zst":
            yield io.BufferedReader(_ZstdStream(raw), buffer_size=2**17)
        else:
            yield raw  # type: ignore[misc]
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: damaged or unreadable ({error})") from error


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames.

    zstandard's own reader does not notice a truncated file; this raises EOFError.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._started = False  # whether the current frame has any bytes yet
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready and self._advance():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _advance(self) -> bool:
        """Decompress some more bytes. Returns False at the end of the last frame."""
        compressed = self._compressed or self._raw.read(ZSTD_READ_BYTES)
        self._compressed = b""
        if not compressed:
            if self._started:
                raise EOFError("the file ends inside a zstd frame")
            return False
        self._started = True
        self._ready = memoryview(self._frame.decompress(compressed))
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._started = False
        return True


def _text_of(line: bytes, text_key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # invalid JSON, encoding, or nested too deeply
        raise ValueError(f"{where}: not a JSON object ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object, but {type(record).__name__}")
    if text_key not in record:
        raise ValueError(f"{where}: no key {text_key!r} among {sorted(record)} (choose one with --text-key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_key!r} is not a string, but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text_key!r} cannot be written as UTF-8 ({error})") from error
    return text

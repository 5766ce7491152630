"""The files of a data prefix, PREFIX.bin and PREFIX.idx (megatron's indexed dataset) and PREFIX.json; and blends.

PREFIX.json is written last: a prefix without it is left by an interrupted build.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import struct
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from griffin.trainer.data.checksums import (
    BLOCK_BYTES,
    DIGITS,
    BlockChecksums,
    Checksums,
    checksums_of_file,
    differences,
    sampled,
)
from griffin.trainer.data.tokenizer import Tokenizer, load_tokenizer
from griffin.trainer.files import is_integer, parse_json, read_regular

logger = logging.getLogger(__name__)

FORMAT = "griffin-data-1"
SUFFIXES = (".bin", ".idx", ".json")
LAST_SEED = 2**32 - 1  # the largest seed of numpy's RandomState, which shuffles
# The index format of megatron-core's indexed dataset. It is read here, since importing megatron-core takes seconds.
_DTYPE_CODES: dict[type[np.number], int] = {np.uint16: 8, np.int32: 4}
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_CHECKED_AT_ONCE = 2**20  # documents or tokens


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """A data set, as PREFIX.json describes it."""

    prefix: str
    tokenizer: dict[str, Any]  # as `Tokenizer.describe`
    tokenizer_spec: str  # "bytes", or the path of the tokenizer's file at the time of the build
    eod_token: str | None  # --eod of the build
    documents: int
    tokens: int  # end-of-document tokens included
    sha256: str  # of PREFIX.bin
    inputs: tuple[str, ...]
    empty: int = 0  # skipped documents, without a token
    undecodable: int = 0  # skipped files, not UTF-8
    checksums: Checksums | None = None  # None if built by a version without checksums
    text_bytes: int | None = None  # of all documents, in UTF-8; None if built by a version that did not count them

    @property
    def vocabulary(self) -> int:
        return self.tokenizer["vocabulary"]

    @property
    def eod(self) -> int:
        return self.tokenizer["eod"]

    @property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of text per token, without end-of-document tokens; None if they were not counted.

        A document has as many predicted tokens as tokens of text: its end is predicted, but not its first token.
        """
        text_tokens = self.tokens - self.documents
        return self.text_bytes / text_tokens if self.text_bytes and text_tokens else None

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer of this data set. Raises ValueError if its file is gone or has changed."""
        tokenizer = load_tokenizer(self.tokenizer_spec, self.eod_token)
        if tokenizer.describe() != self.tokenizer:
            raise ValueError(f"{self.tokenizer_spec} is not the tokenizer that {self.prefix} was built with")
        return tokenizer

    @property
    def dtype(self) -> type[np.number]:
        """The dtype of the token ids in PREFIX.bin."""
        return token_dtype(self.vocabulary)


def token_dtype(vocabulary: int) -> type[np.number]:
    """The dtype in which token ids are stored: megatron-core's `DType.optimal_dtype`."""
    return np.uint16 if vocabulary < 65_500 else np.int32


def require_new(prefix: str) -> None:
    """Raise ValueError if any file of `prefix` exists, so that no data set is ever overwritten."""
    if prefix.endswith(os.sep) or not Path(prefix).name:
        raise ValueError(f"data prefix {prefix!r}: expected a path that ends in a name, such as data/train")
    for suffix in SUFFIXES:
        if os.path.lexists(prefix + suffix):
            raise ValueError(f"{prefix}{suffix} exists: choose another prefix, or remove {prefix}{{.bin,.idx,.json}}")


class PrefixWriter:
    """Writes one prefix under a temporary name; `publish` renames the files.

    `tokenizer` is a `Tokenizer.describe()`. A killed process leaves at most hidden files named *.unfinished.*.
    Raises ValueError if any file of `prefix` exists.
    """

    def __init__(self, prefix: str, tokenizer: dict[str, Any], tokenizer_spec: str, eod_token: str | None) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        require_new(prefix)
        self.prefix = prefix
        self.documents = self.tokens = 0
        self._text_bytes: int | None = 0
        self._tokenizer, self._tokenizer_spec, self._eod_token = tokenizer, tokenizer_spec, eod_token
        path = Path(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = str(path.parent / f".{path.name}.{uuid.uuid4().hex}.unfinished")
        self._digest, self._checksums = hashlib.sha256(), BlockChecksums()
        self._dtype = token_dtype(tokenizer["vocabulary"])
        self._builder = IndexedDatasetBuilder(self._temporary + ".bin", self._dtype)

    def add(self, ids: np.ndarray, text_bytes: int | None = None) -> None:
        """Append one document, integer [tokens], that ends with the end-of-document token.

        `text_bytes` is the size of its text; if it is None for one document, it is unknown for the data set. Raises
        ValueError for an id outside the vocabulary.
        """
        name = f"{self.prefix}: document {self.documents} (counted from 0)"
        if ids.size > np.iinfo(np.int32).max:
            raise ValueError(f"{name} has {ids.size} tokens; the format holds at most {np.iinfo(np.int32).max}")
        check_ids(int(ids.min()), int(ids.max()), self._tokenizer["vocabulary"], name)
        assert ids[-1] == self._tokenizer["eod"], f"{name} does not end in the end-of-document token"
        stored = ids.astype(self._dtype)
        self._digest.update(stored.data)
        self._checksums.update(stored.tobytes())
        self._builder.add_document(stored, [stored.size])
        self.documents += 1
        self.tokens += stored.size
        if self._text_bytes is not None:
            self._text_bytes = None if text_bytes is None else self._text_bytes + text_bytes

    def discard(self) -> None:
        """Remove files that still have a temporary name."""
        self._builder.data_file.close()
        for suffix in SUFFIXES:
            Path(self._temporary + suffix).unlink(missing_ok=True)

    def finish(self, inputs: Iterable[str], *, empty: int = 0, undecodable: int = 0) -> DataInfo:
        """Complete the files, still under their temporary names."""
        self._builder.finalize(self._temporary + ".idx")
        checksums = Checksums(
            block_bytes=BLOCK_BYTES,
            bin=self._checksums.hexdigits(),
            idx=checksums_of_file(self._temporary + ".idx"),
        )
        info = DataInfo(
            prefix=self.prefix,
            tokenizer=self._tokenizer,
            tokenizer_spec=self._tokenizer_spec,
            eod_token=self._eod_token,
            documents=self.documents,
            tokens=self.tokens,
            sha256=self._digest.hexdigest(),
            inputs=tuple(inputs),
            empty=empty,
            undecodable=undecodable,
            checksums=checksums,
            text_bytes=self._text_bytes,
        )
        record = {"format": FORMAT, **asdict(info)}
        del record["prefix"]  # files may be moved
        Path(self._temporary + ".json").write_text(json.dumps(record, indent=2) + "\n")
        return info

    def publish(self) -> None:
        """Rename the finished files, PREFIX.json last. Raises ValueError if one of them exists by now."""
        require_new(self.prefix)
        for suffix in SUFFIXES:
            os.rename(self._temporary + suffix, self.prefix + suffix)


def read_info(prefix: str) -> DataInfo:
    """Read the description of the data set at `prefix`, and check its structure.

    Raises ValueError if a file is missing, empty, truncated or damaged, or if the files disagree. Token ids are checked
    when samples are read.
    """
    _require_files(prefix)
    info = read_description(prefix)
    _check_index(info)
    return info


def read_description(prefix: str) -> DataInfo:
    """Read PREFIX.json only, whether or not the data exist. Raises ValueError if it is missing or damaged."""
    if not Path(prefix + ".json").is_file():
        raise ValueError(f"data prefix {prefix!r}: {prefix}.json is missing (build it with `griffin data build`)")
    try:
        record = parse_json(read_regular(prefix + ".json"))
        if record.pop("format") != FORMAT:
            raise ValueError(f'"format" is not {FORMAT!r}')
        checksums = Checksums(**record["checksums"]) if record.get("checksums") is not None else None
        changed = {"inputs": tuple(record["inputs"]), "checksums": checksums}
        info = DataInfo(prefix=prefix, **{**record, **changed})
        numbers = (info.documents, info.tokens, info.vocabulary, info.eod)
        if not all(type(number) is int for number in numbers) or min(numbers[:3]) < 1:
            raise ValueError("documents, tokens, vocabulary and eod must be positive integers")
        if info.text_bytes is not None and not is_integer(info.text_bytes, 0, 2**63):
            raise ValueError("text_bytes must be a non-negative integer, or absent")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{prefix}.json is damaged: {error!r}") from error
    return info


def check_contents(info: DataInfo, *, whole: bool, seed: int) -> None:
    """Verify PREFIX.bin and PREFIX.idx against their checksums: `whole`, or some blocks that `seed` selects.

    Raises ValueError naming the file and the bytes of the first block that differs. For a prefix that was built without
    block checksums, a whole PREFIX.bin is verified by its SHA-256, and a warning says what is not verified.
    """
    if info.checksums is None:
        where = f"{info.prefix}.idx" if whole else f"{info.prefix}.bin and {info.prefix}.idx"
        logger.warning("%s.json has no checksums of blocks: %s cannot be verified", info.prefix, where)
        if whole:
            _check_sha256(info)
        return
    for problem in _problems(info, None if whole else seed):
        raise ValueError(problem)


def verify(info: DataInfo) -> list[str]:
    """Verify PREFIX.bin and PREFIX.idx completely. Returns a message for each damaged block."""
    if info.checksums is not None:
        return list(_problems(info, None))
    try:
        _check_sha256(info)
    except ValueError as error:
        return [str(error)]
    return []


def _problems(info: DataInfo, seed: int | None) -> Iterator[str]:
    """A message for each damaged block among those that `seed` selects, or among all."""
    assert info.checksums is not None
    block_bytes = info.checksums.block_bytes
    for suffix, digits in ((".idx", info.checksums.idx), (".bin", info.checksums.bin)):
        path = info.prefix + suffix
        blocks = -(-os.path.getsize(path) // block_bytes)
        if len(digits) != DIGITS * blocks:
            yield f"{info.prefix}.json is damaged: its checksums are not those of the {blocks} blocks of {path}"
            continue
        numbers = range(blocks) if seed is None else sampled(blocks, seed)
        yield from differences(path, digits, block_bytes, numbers)


def _check_sha256(info: DataInfo) -> None:
    path = info.prefix + ".bin"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != info.sha256:
        check_tokens(info)  # says where, if it can
        raise ValueError(f"{path} is damaged: bytes 0 to {os.path.getsize(path) - 1} are not what was built")


def check_tokens(info: DataInfo) -> None:
    """Raise ValueError for a token id outside the vocabulary. Reads all of PREFIX.bin."""
    ids = np.memmap(info.prefix + ".bin", info.dtype, "r")
    for start in range(0, ids.size, _CHECKED_AT_ONCE):
        part = ids[start : start + _CHECKED_AT_ONCE]
        check_ids(int(part.min()), int(part.max()), info.vocabulary, f"{info.prefix}.bin is damaged")


def parse_blend(entries: Sequence[str]) -> list[tuple[float | None, str]]:
    """(weight, prefix) of each entry, "PREFIX" or "WEIGHT PREFIX". Weights are None if no entry has one.

    Raises ValueError for no entries, a weight that is not positive and finite, weights whose sum overflows, weights for
    some entries only, or the same prefix twice, even by different paths.
    """
    blend: list[tuple[float | None, str]] = []
    for entry in entries:
        first, _, rest = entry.strip().partition(" ")
        weight = _float(first) if rest else None
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"data entry {entry!r}: the weight must be positive and finite")
        blend.append((weight, entry.strip() if weight is None else rest.strip()))
    prefixes = [prefix for _, prefix in blend]
    if not math.isfinite(sum(weight or 0.0 for weight, _ in blend)):
        raise ValueError(f"data entries {list(entries)!r}: the weights' sum must be finite")
    if not blend or not all(prefixes):
        raise ValueError(f'data entries {list(entries)!r}: expected at least one "PREFIX" or "WEIGHT PREFIX"')
    if len({os.path.realpath(prefix + ".bin") for prefix in prefixes}) < len(prefixes):
        raise ValueError(f"data entries {list(entries)!r}: a prefix is given twice; give it once, with a weight")
    if len({weight is None for weight, _ in blend}) > 1:
        raise ValueError(f"data entries {list(entries)!r}: give every prefix a weight, or none")
    return blend


def read_blend(entries: Sequence[str]) -> list[tuple[float, DataInfo]]:
    """(weight, data set) of each entry of a blend. Weights add up to 1; by default they are proportional to tokens.

    Raises ValueError like `parse_blend` and `read_info`, and if the tokenizers differ.
    """
    blend = [(weight, read_info(prefix)) for weight, prefix in parse_blend(entries)]
    first = blend[0][1]
    for _, info in blend[1:]:
        if info.tokenizer != first.tokenizer:
            raise ValueError(
                f"{info.prefix} was built with tokenizer {info.tokenizer}, {first.prefix} with {first.tokenizer}: "
                "all prefixes of a run need the same"
            )
    weights = [float(info.tokens) if weight is None else weight for weight, info in blend]
    return [(weight / sum(weights), info) for weight, (_, info) in zip(weights, blend, strict=True)]


def check_ids(smallest: int, largest: int, vocabulary: int, where: str) -> None:
    """Raise ValueError if token ids lie outside [0, vocabulary)."""
    if smallest < 0 or largest >= vocabulary:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"{where}: token id {wrong} is outside the tokenizer's vocabulary of {vocabulary}")


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _require_files(prefix: str) -> None:
    for suffix in SUFFIXES:
        path = Path(prefix + suffix)
        if not path.is_file():
            raise ValueError(f"data prefix {prefix!r}: {path} is missing (build it with `griffin data build`)")
        if path.stat().st_size == 0:
            raise ValueError(f"data prefix {prefix!r}: {path} is empty")


def _check_index(info: DataInfo) -> None:
    """Check .idx against .json and .bin, since megatron-core trusts them when it maps them."""
    bin_path, idx_path = info.prefix + ".bin", info.prefix + ".idx"
    item = np.dtype(info.dtype).itemsize
    with open(idx_path, "rb") as file:
        header = file.read(_INDEX_HEADER.size)
    wanted = (_INDEX_MAGIC, 1, _DTYPE_CODES[info.dtype], info.documents, info.documents + 1)
    if len(header) < _INDEX_HEADER.size or _INDEX_HEADER.unpack(header) != wanted:
        raise ValueError(f"{idx_path} is damaged: its header does not agree with {info.prefix}.json")
    # int32 length and int64 offset of every document; int64 index of every document, and their number
    idx_size = _INDEX_HEADER.size + info.documents * (4 + 8) + (info.documents + 1) * 8
    for path, size in ((idx_path, idx_size), (bin_path, info.tokens * item)):
        if os.path.getsize(path) != size:
            raise ValueError(f"{path} is damaged: {os.path.getsize(path)} bytes long instead of {size}")
    all_lengths = np.memmap(idx_path, np.int32, "r", _INDEX_HEADER.size, (info.documents,))
    all_pointers = np.memmap(idx_path, np.int64, "r", _INDEX_HEADER.size + all_lengths.nbytes, (info.documents,))
    end = 0
    for start in range(0, info.documents, _CHECKED_AT_ONCE):
        lengths = all_lengths[start : start + _CHECKED_AT_ONCE].astype(np.int64)
        ends = end + np.cumsum(lengths) * item
        pointers = all_pointers[start : start + _CHECKED_AT_ONCE]
        if lengths.min() < 1 or not np.array_equal(ends - lengths * item, pointers):
            raise ValueError(f"{idx_path} is damaged: its documents' lengths and offsets do not agree")
        end = int(ends[-1])
    ends_at = _INDEX_HEADER.size + all_lengths.nbytes + all_pointers.nbytes
    numbers = np.memmap(idx_path, np.int64, "r", ends_at, (info.documents + 1,))
    for start in range(0, info.documents + 1, _CHECKED_AT_ONCE):
        part = numbers[start : start + _CHECKED_AT_ONCE]
        if not np.array_equal(part, np.arange(start, start + part.size)):
            raise ValueError(f"{idx_path} is damaged: its document numbers are not consecutive")
    if end != info.tokens * item:
        raise ValueError(f"{idx_path} is damaged: its documents do not add up to {bin_path}")

"""Tokenizers: raw bytes, Hugging Face `tokenizers` files and SentencePiece models behind one interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from griffin.parallel.config import MOST_VOCABULARY
from griffin.trainer.files import read_regular

BYTES = "bytes"
MOST_FILE_BYTES = 2**28
# Names of the end-of-document token in published tokenizers, tried in this order.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class Tokenizer(ABC):
    """Text to token ids and back. Every id is in [0, vocabulary)."""

    kind: str
    spec: str  # "bytes", or the absolute path of the tokenizer's file
    vocabulary: int
    eod: int  # id of the end-of-document token
    bos: int | None = None  # id of the token that begins a prompt, if the file names one; not used in training
    sha256: str | None = None  # of the tokenizer's file

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [tokens]. Names of special tokens in the text are plain text."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """Like `encode`, but names of special tokens in the text, such as that of a turn, become these tokens."""
        return self.encode(text)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without end-of-document tokens."""

    def describe(self) -> dict[str, Any]:
        """The identity of this tokenizer, as JSON values. It must be the same for all data of a run."""
        return {"kind": self.kind, "vocabulary": self.vocabulary, "eod": self.eod, "sha256": self.sha256}


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255; 256 ends a document."""

    kind = BYTES
    spec = BYTES
    vocabulary = 257
    eod = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i != self.eod).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` library."""

    kind = "huggingface"

    def __init__(self, path: Path, eod: str | None) -> None:
        from tokenizers import Tokenizer as Backend

        content = _read(path)
        with _value_errors(f"tokenizer {path}: not a Hugging Face tokenizer file"):
            self._backend = Backend.from_buffer(content)
        # A truncation or padding in the file would change documents. Names of special tokens in a text are plain text.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.spec = str(path.absolute())
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocabulary = _checked(path, 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1))
        self.eod = _find_eod(path, self._backend.token_to_id, eod)

    def encode(self, text: str) -> np.ndarray:
        with _value_errors(f"tokenizer {self.spec}: cannot encode a text"):
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        self._backend.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._backend.encode_special_tokens = True

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids if i != self.eod], skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model file."""

    kind = "sentencepiece"

    def __init__(self, path: Path, eod: str | None) -> None:
        from sentencepiece import SentencePieceProcessor

        content = _read(path)
        with _value_errors(f"tokenizer {path}: not a SentencePiece model"):
            self._backend = SentencePieceProcessor(model_proto=content)
        self.spec = str(path.absolute())
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocabulary = _checked(path, self._backend.vocab_size())
        self.bos = self._backend.bos_id() if self._backend.bos_id() >= 0 else None
        if eod is None and self._backend.eos_id() >= 0:
            self.eod = self._backend.eos_id()
        else:
            self.eod = _find_eod(path, self._id_of, eod)

    def _id_of(self, piece: str) -> int | None:
        number = self._backend.piece_to_id(piece)  # the id of the unknown piece if absent
        return number if self._backend.id_to_piece(number) == piece else None

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._backend.encode(text, out_type=int), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids if i != self.eod])


def load_tokenizer(spec: str, eod: str | None = None) -> Tokenizer:
    """The tokenizer named by `spec`: "bytes", a Hugging Face tokenizer.json or a SentencePiece .model.

    `eod` names the end-of-document token, if it is not the first of the usual names. Raises ValueError for any other
    `spec`, a missing or damaged file, or a missing end-of-document token.
    """
    if spec == BYTES:
        if eod is not None:
            raise ValueError(f"--eod {eod}: the bytes tokenizer has its own end-of-document token, {ByteTokenizer.eod}")
        return ByteTokenizer()
    path = Path(spec).expanduser()
    kinds: dict[str, type[HuggingFaceTokenizer] | type[SentencePieceTokenizer]]
    kinds = {".json": HuggingFaceTokenizer, ".model": SentencePieceTokenizer}
    if path.suffix not in kinds:
        raise ValueError(
            f'tokenizer {spec!r}: expected "{BYTES}", a Hugging Face tokenizer file (.json) or a SentencePiece model '
            "(.model)"
        )
    if not path.exists():
        raise ValueError(f"tokenizer {spec!r}: no such file")
    return kinds[path.suffix](path, eod)


def _read(path: Path) -> bytes:
    """Read a tokenizer's file. ValueError if it is unreadable, empty or too large."""
    try:
        content = read_regular(path, MOST_FILE_BYTES)
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {error.strerror}") from None
    if not content:
        raise ValueError(f"tokenizer {path}: is empty")
    return content


@contextmanager
def _value_errors(message: str) -> Iterator[None]:
    """Turn whatever a library raises into a ValueError that begins with `message`."""
    try:
        yield
    except BaseException as error:  # tokenizers raises bare Exceptions; panics of its Rust code are BaseExceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{message} ({error})") from None


def _checked(path: Path, vocabulary: int) -> int:
    if not 1 <= vocabulary <= MOST_VOCABULARY:
        raise ValueError(f"tokenizer {path}: has {vocabulary} tokens; must have from 1 to {MOST_VOCABULARY}")
    return vocabulary


def _find_eod(path: Path, id_of, eod: str | None) -> int:
    """The id of the token `eod`, or of the first usual name that the tokenizer has. `id_of` returns None if absent."""
    if eod is not None:
        found = id_of(eod)
        if found is None:
            raise ValueError(f"--eod {eod}: tokenizer {path} has no such token")
        return found
    for name in END_OF_DOCUMENT_NAMES:
        found = id_of(name)
        if found is not None:
            return found
    raise ValueError(
        f"tokenizer {path}: none of {', '.join(END_OF_DOCUMENT_NAMES)} is in its vocabulary; "
        "name its end-of-document token with --eod TOKEN"
    )

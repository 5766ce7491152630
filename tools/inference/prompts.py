"""Encode prompts and decode answers with a checkpoint's tokenizer; read files of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin.parallel.config import MOST_VOCABULARY
from griffin.tools.checkpoints.auxiliary_files import (
    CONFIG,
    SOURCE_FOLDER,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    find_files,
    read_object,
)
from griffin.trainer.checkpoint.manifest import Manifest
from griffin.trainer.data.tokenizer import Tokenizer, load_tokenizer
from griffin.trainer.files import is_integer, parse_json, read_regular
from griffin.trainer.run.tokenizer_copy import find_tokenizer

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
TOKENIZERS = (TOKENIZER_JSON, TOKENIZER_MODEL)


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer with the token that begins prompts, `bos`, if there is one, and those that end answers, `stops`."""

    tokenizer: Tokenizer
    bos: int | None
    stops: frozenset[int]

    def encode(self, prompt: str, vocabulary: int, where: str) -> list[int]:
        """Return a prompt's token ids. Raises ValueError, beginning with `where`, if it has none or an unknown one."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: must be text that UTF-8 can encode ({error.reason})") from None
        ids = self.tokenizer.encode_prompt(prompt).tolist()
        if self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        if not ids:
            raise ValueError(f"{where} {prompt!r}: must have at least one token: this model has no BOS token")
        if max(ids) >= vocabulary:
            raise ValueError(
                f"{where}: has token {max(ids)} of tokenizer {self.tokenizer.spec}; must be below {vocabulary}, the "
                "model's vocabulary"
            )
        return ids

    def decode(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """Return the text of an answer to a prompt, without the token that ended it.

        Prompt and answer are decoded together, since the answer alone might lose a leading space. Ids beyond the
        tokenizer's vocabulary, which may be smaller than the model's, are left out.
        """
        if answer and answer[-1] in self.stops:
            answer = answer[:-1]
        before, both = (self._text(ids) for ids in (prompt, (*prompt, *answer)))
        return both.removeprefix(before) if both.startswith(before) else self._text(answer)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in ids if token < self.tokenizer.vocabulary])


def find_prompt_tokenizer(
    folder: Path, manifest: Manifest, tokenizer: str | None = None, eod: str | None = None
) -> PromptTokenizer:
    """Find a checkpoint's tokenizer and special tokens: in its own files if it was converted, else those of its data.

    Args:
        folder: the step's folder.
        manifest: the step's manifest.
        tokenizer: a tokenizer to use instead, as for `load_tokenizer`.
        eod: the end-of-document token, as for `load_tokenizer`.

    Raises ValueError if there is no tokenizer, or if it has changed.
    """
    source = folder / SOURCE_FOLDER
    if tokenizer is not None:
        found = load_tokenizer(tokenizer, eod)
    elif (file := next(iter(find_files(source, TOKENIZERS).values()), None)) is not None:
        found = load_tokenizer(str(file), eod or _name(_read(source / TOKENIZER_CONFIG).get("eos_token")))
    elif data := manifest.config["data"]["train"]:
        found = _data_tokenizer(folder, data)
    else:
        raise ValueError(f"{folder}: has no tokenizer; name one with --tokenizer FILE")
    configs = [_read(source / name) for name in (GENERATION_CONFIG, CONFIG)]
    bos = _ids("bos_token_id", configs)
    if not bos and source.is_dir() and not (source / CONFIG).is_file() and found.bos is not None:
        bos = [found.bos]  # of a SentencePiece model without a config.json
    stops = _ids("eos_token_id", configs) or [found.eod]
    return PromptTokenizer(found, bos[0] if bos else None, frozenset(stops))


def _data_tokenizer(folder: Path, entries: Sequence[str]) -> Tokenizer:
    """Return the tokenizer of a trained model's data, whose documents have no BOS token."""
    try:
        return find_tokenizer(folder, entries)
    except ValueError as error:
        raise ValueError(f"{error}; or name the tokenizer with --tokenizer FILE") from None


def _ids(key: str, configs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the token ids under a key, from the first of some files that has it."""
    for values in configs:
        if (found := values.get(key)) is not None:
            ids = found if isinstance(found, list) else [found]
            if not ids or not all(is_integer(one, 0, MOST_VOCABULARY) for one in ids):
                raise ValueError(
                    f"{key} = {found!r} in the checkpoint's {SOURCE_FOLDER}/: must be an integer or some, from 0"
                )
            return ids
    return []


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file; empty if it is missing."""
    return read_object(path) if path.is_file() else {}


def _name(token: Any) -> str | None:
    """Return the text of a special token, which transformers writes as a string or an object."""
    found = token.get("content") if isinstance(token, dict) else token
    if found is not None and not isinstance(found, str):
        raise ValueError(
            f"eos_token = {token!r} in the checkpoint's {SOURCE_FOLDER}/{TOKENIZER_CONFIG}: must be a token's text"
        )
    return found


def read_prompts(path: Path) -> dict[str, str]:
    """Read the prompts of a file by their place in it: "prompt" of a .jsonl's objects, or every line that has text.

    Raises ValueError naming a line that has none.
    """
    try:
        lines = read_regular(path).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise ValueError(f"--batch {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--batch {path}: must be UTF-8 ({error})") from None
    as_json = path.suffix.lower() == ".jsonl"
    prompts = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"--batch {path}, line {number}"
            prompts[where] = _prompt(line, where) if as_json else line
    if not prompts:
        raise ValueError(f"--batch {path}: holds no prompt")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        prompt = parse_json(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: must be a JSON object with a string "prompt"')
    return prompt

"""Text for and from a checkpoint's model: its tokenizer, what a prompt begins with, and what ends an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin.tools.carried_files import CONFIG, SOURCE, TOKENIZER_JSON, TOKENIZER_MODEL
from griffin.trainer.checkpoint.manifest import Manifest
from griffin.trainer.data.prefix import read_blend
from griffin.trainer.data.tokenizer import Tokenizer, load_tokenizer

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
TOKENIZERS = (TOKENIZER_JSON, TOKENIZER_MODEL)


@dataclass(frozen=True)
class Language:
    """How a model reads and writes text. `bos` begins prompts, where there is one; any of `stops` ends an answer."""

    tokenizer: Tokenizer
    bos: int | None
    stops: frozenset[int]

    def encode(self, prompt: str, vocabulary: int) -> list[int]:
        """A prompt's token ids. Raises ValueError where it has none, or one that the model does not know."""
        ids = self.tokenizer.encode_prompt(prompt).tolist()
        if self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        if not ids:
            raise ValueError("--prompt '': must have a token, for this model knows none that begins a text")
        if max(ids) >= vocabulary:
            raise ValueError(
                f"the tokenizer's token {max(ids)} is outside of the model's vocabulary of {vocabulary}: it is another "
                "model's"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's text, without the token that ended it and those for which the tokenizer has no text.

        A model's vocabulary may be larger than its tokenizer's.
        """
        if ids and ids[-1] in self.stops:
            ids = ids[:-1]
        return self.tokenizer.decode([token for token in ids if token < self.tokenizer.vocabulary])


def find_language(folder: Path, manifest: Manifest, tokenizer: str | None) -> Language:
    """What a checkpoint says, which carries the files of the model that it was converted from, or knows its data.

    Args:
        folder: of the step.
        tokenizer: as `load_tokenizer` has it, to use in place of the checkpoint's.

    Raises ValueError where no tokenizer is found, or one that has changed.
    """
    source = folder / SOURCE
    configs = [_read(source / name) for name in (GENERATION_CONFIG, CONFIG)]
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
    elif (spec := next((path for path in map(source.joinpath, TOKENIZERS) if path.is_file()), None)) is not None:
        found = load_tokenizer(str(spec), _name(_read(source / TOKENIZER_CONFIG).get("eos_token")))
    elif data := manifest.config["data"]["train"]:
        # A model that was trained here knows documents, which nothing begins.
        found = read_blend(data)[0][1].load_tokenizer()
        return Language(found, None, frozenset({found.eod}))
    else:
        raise ValueError(f"{folder}: carries no tokenizer; name one with --tokenizer FILE")
    if not source.is_dir():
        return Language(found, None, frozenset({found.eod}))
    bos = next((values["bos_token_id"] for values in configs if "bos_token_id" in values), found.bos)
    stops = next((values["eos_token_id"] for values in configs if values.get("eos_token_id") is not None), found.eod)
    return Language(found, bos, frozenset(stops if isinstance(stops, list) else [stops]))


def _read(path: Path) -> dict[str, Any]:
    """A file of settings; none where it is missing. Raises ValueError for what is no JSON object."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return values


def _name(token: Any) -> str | None:
    """The text of a special token, which transformers writes as it is or with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: of a .jsonl's objects what "prompt" is, of another one the lines that are not empty.

    Raises ValueError naming the line that holds none.
    """
    if not path.is_file():
        raise ValueError(f"--batch {path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--batch {path}: must be UTF-8 ({error})") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_prompt(line, f"--batch {path}, line {number}") if path.suffix == ".jsonl" else line)
    if not prompts:
        raise ValueError(f"--batch {path}: holds no prompt")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: must be a JSON object with a string "prompt"')
    return prompt

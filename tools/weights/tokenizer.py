"""Find what is exported beside the weights: the tokenizer, token ids, and other keys of the source's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from griffin.tools.checkpoints.auxiliary_files import (
    CONFIG,
    SOURCE_FOLDER,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    find_files,
    read_object,
    tokenizer_text,
)
from griffin.tools.checkpoints.sources import SourceCheckpoint
from griffin.trainer.data.prefix import parse_blend, read_description
from griffin.trainer.data.tokenizer import BYTES, MOST_FILE_BYTES, Tokenizer
from griffin.trainer.files import read_regular
from griffin.trainer.run.tokenizer_copy import find_tokenizer

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class AuxiliaryFiles:
    """Files to export beside the weights, and keys of config.json besides the model's own settings."""

    config: Mapping[str, Any]
    summary: str  # what was found, for a message
    files: Mapping[str, Path] = field(default_factory=dict)  # to copy, by their new names
    json_files: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # to write, by name


def find_auxiliary_files(source: SourceCheckpoint, tokenizer: Path | None) -> AuxiliaryFiles:
    """Find the files to export with a checkpoint: from the folder `tokenizer`, else the checkpoint, else its data.

    Raises ValueError if the folder `tokenizer` has no tokenizer file.
    """
    own_folder = source.path / SOURCE_FOLDER
    files = find_files(tokenizer or own_folder)
    if tokenizer is not None and not any(name in TOKENIZER_FILES for name in files):
        raise ValueError(f"--tokenizer {tokenizer}: must be a folder with one of {', '.join(TOKENIZER_FILES)}")
    if tokenizer is None and not own_folder.is_dir():
        return _files_of_training_data(source)
    config: dict[str, Any] = read_object(own_folder / CONFIG) if (own_folder / CONFIG).is_file() else {}
    config |= dict.fromkeys(_IDS)  # token ids come from the tokenizer's folder, which may be another one
    if CONFIG in files:
        tokenizer_config = read_object(files[CONFIG])
        config |= {key: tokenizer_config[key] for key in _IDS if key in tokenizer_config}
    elif TOKENIZER_MODEL in files:
        config |= sentencepiece_ids(files[TOKENIZER_MODEL])
    files.pop(CONFIG, None)
    return AuxiliaryFiles(config, tokenizer_text(files), files)


def sentencepiece_ids(path: Path) -> dict[str, int | None]:
    """Return the token ids that a SentencePiece model defines. Raises ValueError if the file is not one."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=read_regular(path, MOST_FILE_BYTES))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error})") from None
    ids = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "pad_token_id": model.pad_id()}
    return {name: number if number >= 0 else None for name, number in ids.items()}


def _files_of_training_data(source: SourceCheckpoint) -> AuxiliaryFiles:
    """Find the tokenizer of the data that a checkpoint was trained on, or its copy in the run folder."""
    ids: dict[str, Any] = dict.fromkeys(_IDS)
    entries = source.manifest.config["data"]["train"]
    if not entries:
        return AuxiliaryFiles(ids, "no tokenizer: this checkpoint names none")
    try:
        tokenizer = find_tokenizer(source.path, entries)
    except ValueError as error:
        with suppress(ValueError):  # the data set may state the id without the file
            ids["eos_token_id"] = read_description(parse_blend(entries)[0][1]).eod
        return AuxiliaryFiles(ids, f"no tokenizer: {error}")
    ids["eos_token_id"] = tokenizer.eod
    if tokenizer.spec == BYTES:
        return AuxiliaryFiles(ids, "no tokenizer: the model was trained on bytes")
    return _tokenizer_file(tokenizer, ids)


def _tokenizer_file(tokenizer: Tokenizer, ids: dict[str, Any]) -> AuxiliaryFiles:
    """Return the file of a data set's tokenizer, with a tokenizer_config.json where transformers needs one."""
    path = Path(tokenizer.spec)
    if path.suffix == ".model":
        return AuxiliaryFiles(ids, f"tokenizer files: {TOKENIZER_MODEL} ({path})", files={TOKENIZER_MODEL: path})
    from tokenizers import Tokenizer as Backend

    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": Backend.from_file(str(path)).id_to_token(tokenizer.eod),
    }
    json_files = {"tokenizer_config.json": described}
    summary = f"tokenizer files: {TOKENIZER_JSON} ({path}), {', '.join(json_files)}"
    return AuxiliaryFiles(ids, summary, files={TOKENIZER_JSON: path}, json_files=json_files)
